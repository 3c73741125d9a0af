"""The engine, with the pack in an otherwise empty custom_nodes, and the shipped model in it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.comfyui import engine, models
from tests.conftest import ROOT

HERE = Path(__file__).resolve().parent


def pytest_collection_modifyitems(config, items):
    """The engine's modules have common names (nodes, utils): its tests want a process of their own."""
    if all(HERE in [path, *path.parents] for path in (Path(arg.split("::")[0]).resolve() for arg in config.args)):
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="they run by themselves: python -m pytest tests/comfyui"))


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """ComfyUI's folder: models, custom_nodes, output."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    runpy.run_path(ROOT / "comfyui" / "gather.py")["gather"](base / "custom_nodes" / "hyena")
    return base


@pytest.fixture(scope="session")
def running(base):
    """The running engine, with `node(id, **inputs)` and the pack's modules as `pack`."""
    try:
        started = engine.start(base)
    except engine.NotToBeHad as error:
        pytest.skip(f"no ComfyUI to test in: {error}")
    assert "HyenaApplyStudents" in started.nodes.NODE_CLASS_MAPPINGS, "the pack was not loaded; see the log above"
    return started


@pytest.fixture
def model(running, unet):
    """The shipped UNet as a ComfyUI model."""
    return models.patcher_of(unet)
