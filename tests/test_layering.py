"""Who may import whom: the rooms of the design, held by a test."""

import ast
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

THIRD_PARTY_OF_SAFARI = {"torch", "einops", "safari", "flash_attn"}
LEAVES = {"sites": {"errors"}, "losses": set(), "errors": set(), "atomic_file": set(), "file_names": {"errors"}}
LEAVES |= {"tiling": {"errors"}, "around": set(), "bricks": {"atomic_file", "errors"}}
LEAVES |= {
    "prompt": set(),
    "infotext": {"errors", "sampler"},
    "safetensors_header": {"errors"},
    "weights_kind": {"errors"},
}
LEAVES |= {"given_path": {"errors", "safetensors_header", "weights_kind"}}
LEAVES |= {
    "sampler": set(),
    "rules": {"errors"},
    "yaml_file": {"errors"},
    "options": {"errors", "image_file", "infotext", "yaml_file"},
    "config": {"errors", "file_names", "given_path", "options", "rules", "sampler"},
    "image_file": {"atomic_file", "errors", "file_names"},
}


def imports(path: Path) -> set[str]:
    """Top-level names of everything a file imports, our own modules as `sd_hyena.x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "sd_hyena" else {node.module}
            )
    return {name if name.startswith("sd_hyena") else name.split(".")[0] for name in found}


def ours(module: str) -> set[str]:
    found = {n.split(".")[1] for n in imports(ROOT / "sd_hyena" / f"{module}.py") if n.startswith("sd_hyena.")}
    return found - {"__version__"}


def reachable(module: str) -> set[str]:
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += ours(name)
    return seen


@pytest.mark.parametrize("path", sorted((ROOT / "safari").glob("*.py")), ids=lambda p: p.name)
def test_safari_imports_torch_and_einops_only(path):
    assert imports(path) - set(sys.stdlib_module_names) <= THIRD_PARTY_OF_SAFARI


@pytest.mark.parametrize("module", LEAVES)
def test_leaves_stay_leaves(module):
    assert ours(module) <= LEAVES[module]


def test_generation_never_imports_lightning_and_the_students_learn_without_a_unet():
    for module in reachable("generation"):
        assert "lightning" not in imports(ROOT / "sd_hyena" / f"{module}.py"), module
    assert not {"swap", "pipeline", "sites", "data", "generation"} & ours("distill")


def test_the_reference_is_imported_by_tests_only():
    for path in [*(ROOT / "sd_hyena").glob("*.py"), *(ROOT / "safari").glob("*.py")]:
        assert not re.search(r"^\s*(from|import)\b.*\breference\b", path.read_text(), re.MULTILINE), path


def test_nothing_imports_the_scripts():
    for path in [*(ROOT / "sd_hyena").glob("*.py"), *(ROOT / "safari").glob("*.py")]:
        assert not {"train", "generate", "examples", "tests", "benchmarks"} & imports(path)


def test_there_is_no_room_for_odds_and_ends():
    names = {path.stem for path in ROOT.glob("**/*.py") if ".venv" not in path.parts}
    assert not names & {"utils", "helpers", "common", "misc", "mods"}
