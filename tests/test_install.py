"""The wheel alone: built, installed into a bare environment, used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

pytestmark = pytest.mark.gate

LARGEST = 16_000_000  # bytes
LEFT_OUT = (".git", ".venv", "runs", "out", "logs", "build", "dist", "__pycache__", "*.egg-info", ".*_cache")


def ran(*command, cwd: Path, **environment) -> str:
    """What a command says; the checkout is nowhere on its path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    ran(sys.executable, *"-m pip wheel . --no-deps --no-build-isolation -w ..".split(), cwd=folder / "tree")
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def bin_(wheel, tmp_path_factory) -> Path:
    """Where the commands of an environment are that has the wheel, and sees the packages of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    ran(sys.executable, "-m", "venv", "--without-pip", folder, cwd=wheel.parent)
    python = folder / "bin" / "python"
    ran(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=wheel.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages-of-the-tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.fixture
def empty(tmp_path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_the_wheel_holds_every_module_and_what_it_needs_and_is_small(wheel):
    assert wheel.stat().st_size < LARGEST
    inside = set(zipfile.ZipFile(wheel).namelist())
    tree = wheel.parent / "tree"
    modules = {
        path.relative_to(tree).as_posix() for name in ("safari", "sd_hyena") for path in tree.glob(f"{name}/**/*.py")
    }
    data = {f"sd_hyena/configs/{path.relative_to(tree / 'configs').as_posix()}" for path in tree.glob("configs/*/*")}
    model = tree / "examples" / "tiny_sd" / "model"
    data |= {
        f"sd_hyena/tiny_sd/model/{path.relative_to(model).as_posix()}" for path in model.rglob("*") if path.is_file()
    }
    data |= {f"sd_hyena/ui/{path.name}" for path in tree.glob("sd_hyena/ui/*.[jc]s*")}
    data |= {f"sd_hyena/tiny_sd/students/{name}.safetensors" for name in ("level0", "all")}
    data |= {"sd_hyena/py.typed", "safari/py.typed"}
    assert len(modules) > 60 and len(data) > 20 and modules | data <= inside
    assert not [
        name for name in inside if name.endswith(".png") or name.startswith(("tests", "examples", "benchmarks"))
    ]


def test_a_bare_environment_draws_from_an_empty_folder_with_nothing_but_the_wheel(bin_, empty):
    assert "--n_steps" in ran(bin_ / "sd-hyena", "demo", "-h", cwd=empty)
    said = ran(bin_ / "sd-hyena", "doctor", "--device", "cpu", cwd=empty)
    assert "FAILS" not in said and said.endswith("all in order\n")
    assert f"{bin_.parent}/lib" in said  # the model is the wheel's
    drawn = ran(
        bin_ / "sd-hyena", *"generate -y level0 -W 256 -n 1 -s 2 -k 7 -c 3 --device cpu -o pictures".split(), cwd=empty
    )
    assert " · 256x256 · 2 steps of ddim · guidance 3 · seed 7 · " in drawn.splitlines()[0]
    assert "level0 (5 students)" in drawn and "pictures/image_000.png" in drawn.splitlines()
    with Image.open(empty / "pictures" / "image_000.png") as image:
        assert image.size == (256, 256) and len(image.getcolors(256 * 256)) > 100
    assert sorted(path.name for path in empty.iterdir()) == ["pictures"]


def test_what_only_a_checkout_has_is_found_in_the_wheel(bin_, empty):
    """The configs by the names that the documents use, and the judge of the shipped model's pictures."""
    code = (
        "import sys, sd_hyena, safari\n"
        "from importlib import import_module\n"
        "from sd_hyena.options.shipped import SHIPPED_JUDGE\n"
        "from sd_hyena.recipe import read_recipe\n"
        "assert len(read_recipe(['configs/recipes/tiny_sd_all.yaml'])) == 1\n"
        "module, _, name = SHIPPED_JUDGE.partition(':')\n"
        "assert callable(getattr(import_module(module), name))\n"
        "print(sd_hyena.__file__, safari.__file__, sys.modules[module].__file__)\n"
    )
    for path in ran(bin_ / "python", "-c", code, cwd=empty).split():
        assert Path(path).is_relative_to(bin_.parent), path
    assert not list(empty.iterdir())
