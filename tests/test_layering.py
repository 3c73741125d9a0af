"""Who may import whom: the wings and their layers as one table, and the rules that follow from it."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = {  # of wings (folders) and of single files; what stands higher may import what stands lower
    "demo": 10,
    "doctor": 10,
    "recipe": 10,
    "upscale": 10,
    "ui": 9,
    "evaluate": 8,
    "generate": 7,
    "distil": 6,
    "text": 6,
    "cost": 5,
    "models": 5,
    "large": 4,
    "students": 4,
    "options": 3,
    "files": 2,
    "processes": 2,
    "errors": 1,
    "sites": 1,
}
THIRD_PARTY_OF_SAFARI = {"torch", "einops", "safari", "flash_attn"}
LIGHT = {"torch", "einops", "safetensors", "numpy", "tqdm"}  # what a program that only loads students must have
WITHOUT_TORCH = ("options", "errors")
PACKAGE = ROOT / "sd_hyena"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path for name, path in FILES.items() if path.name not in ("__init__.py", "__main__.py")}


@cache
def imports(path: Path) -> set[str]:
    """Everything that a file imports, wherever it does: our own modules whole, of others the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            below = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= below or {node.module}
    return {name if name.startswith("sd_hyena") else name.split(".")[0] for name in found}


def place(module: str) -> str:
    """The wing of a module, or its own name if it lies beside the wings."""
    return module.split(".")[1]


def ours(module: str) -> set[str]:
    return {name for name in imports(MODULES[module]) if name in MODULES}


def reachable(module: str) -> set[str]:
    todo, seen = [module], set()
    while todo:
        if (name := todo.pop()) not in seen:
            seen.add(name)
            todo += ours(name)
    return seen


def test_every_wing_and_file_has_its_layer_and_says_what_it_is_for():
    assert {place(module) for module in MODULES} <= LAYERS.keys()
    for path in PACKAGE.glob("*/__init__.py"):
        (docstring,) = ast.parse(path.read_text("utf-8")).body
        assert isinstance(docstring, ast.Expr) and 1 <= len(docstring.value.value.splitlines()) <= 2, path


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_its_own_wing_and_what_lies_below(module):
    for other in ours(module) - {module}:
        same = place(module) == place(other)
        ground = LAYERS[place(module)] == LAYERS[place(other)] == 1
        assert same or ground or LAYERS[place(other)] < LAYERS[place(module)], f"{module} imports {other}"


def test_nothing_imports_in_circles():
    done: set[str] = set()

    def visit(module: str, on_the_way: tuple[str, ...]) -> None:
        assert module not in on_the_way, " -> ".join((*on_the_way, module))
        if module not in done:
            for other in ours(module):
                visit(other, (*on_the_way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "safari").glob("*.py")), ids=lambda p: p.name)
def test_safari_imports_torch_and_einops_only(path):
    assert imports(path) - set(sys.stdlib_module_names) <= THIRD_PARTY_OF_SAFARI


def test_generation_never_imports_lightning_and_training_no_tile_fusion():
    for module in (name for name in MODULES if place(name) == "generate"):
        for reached in reachable(module):
            assert "lightning" not in imports(MODULES[reached]), reached
    fusion = {"sd_hyena.large.tiled_unet", "sd_hyena.large.regions", "sd_hyena.large.tiled_attention"}
    for module in (name for name in MODULES if place(name) == "distil"):
        assert not reachable(module) & fusion, module


def test_the_students_learn_without_a_unet():
    names = {f"sd_hyena.{name}" for name in ("students.swap", "models.pipeline", "sites", "distil.lessons")}
    assert not names & ours("sd_hyena.distil.module")


def loaded_by(*codes: str) -> list[set[str]]:
    """Packages that a fresh process has imported after each of some pieces of code, run one after the other."""
    said = "import sys; print(*{name.split('.')[0] for name in sys.modules})"
    code = "\n".join(f"{code}\n{said}" for code in codes)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()[-len(codes) :]]


def test_a_students_file_is_loaded_with_nothing_heavier_than_torch():
    heavy = {"diffusers", "transformers", "lightning", "jsonargparse", "PIL", "matplotlib", "scipy", "torchmetrics"}
    needed, ours = loaded_by(
        "import torch, einops, safetensors.torch, numpy, tqdm",
        "import sd_hyena.students.checkpoint, sd_hyena.students.swap",
    )
    new = {name for name in ours - needed - set(sys.stdlib_module_names) if not name.startswith("_")}
    assert new <= {"safari", "sd_hyena"} and not ours & heavy


def test_options_are_read_without_torch():
    light = [name for name in MODULES if place(name) in WITHOUT_TORCH]
    (loaded,) = loaded_by(f"import {', '.join(light)}")
    assert "torch" not in loaded


def test_the_reference_is_imported_by_tests_only():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "safari").glob("*.py")]:
        assert not re.search(r"^\s*(from|import)\b.*\breference\b", path.read_text(), re.MULTILINE), path


def test_nothing_imports_the_scripts():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "safari").glob("*.py")]:
        assert not {"train", "generate", "examples", "tests", "benchmarks"} & imports(path)


def test_there_is_no_room_for_odds_and_ends():
    names = {path.stem for path in ROOT.glob("**/*.py") if ".venv" not in path.parts}
    assert not names & {"utils", "helpers", "common", "misc", "mods"}


def test_the_tests_are_no_package_so_that_none_of_them_loads_the_root_that_is_for_comfyui():
    assert not list((ROOT / "tests").rglob("__init__.py"))
    (loaded,) = loaded_by("import sys, importlib; importlib.import_module('__init__')")
    assert loaded.isdisjoint({"comfyui", "sd_hyena"})
