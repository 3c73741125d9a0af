"""How the pack comes into a ComfyUI, and what it imports there."""

import importlib.metadata
import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest

from sd_hyena.students.checkpoint import StudentFile, save_students
from tests.comfyui import engine, models
from tests.conftest import ROOT

LIGHT = ("torch", "einops", "safetensors", "numpy", "tqdm")
IN_THE_ENGINE = """
import json, pathlib, runpy, sys
sys.modules |= dict.fromkeys(["diffusers", "lightning", "jsonargparse"])  # a ComfyUI has none of these
sys.path.insert(0, sys.argv[3])  # for the tests' own helper alone
helper, base = runpy.run_path(sys.argv[1]), pathlib.Path(sys.argv[2])
del sys.path[0], sys.modules["tests.fetched"], sys.modules["tests"]
path = list(sys.path)
running = helper["start"](base)
nodes = sorted(name for name in running.nodes.NODE_CLASS_MAPPINGS if name.startswith("Hyena"))
students, text = helper["call"](running, "HyenaLoadStudents", file="one.safetensors", dtype="float32")
import safari, sd_hyena
stray = {"tests", "benchmarks", "examples", "train", "generate", "comfyui"} & set(sys.modules)
print(json.dumps([nodes, text, safari.__file__, sd_hyena.__file__, sorted(stray), str(base) in "".join(sys.path)]))
"""
WITHOUT_THE_ENGINE = """
import importlib, sys, types
import torch, einops, safetensors.torch, numpy, tqdm
allowed = set(sys.argv[2].split()) | set(sys.stdlib_module_names) | {"safari", "sd_hyena", "pack"}

class Only:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        known = name.split(".")[0] in allowed or name.startswith("_sysconfigdata")
        return self.finder.find_spec(name, path, target) if known else None

class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

sys.meta_path[:] = map(Only, sys.meta_path)
for name in ("", ".model_management", ".utils", ".ldm", ".ldm.modules", ".ldm.modules.attention",
             ".ldm.modules.diffusionmodules", ".ldm.modules.diffusionmodules.model"):
    sys.modules["comfy" + name] = Anything("comfy" + name)
sys.modules["folder_paths"] = types.ModuleType("folder_paths")
sys.modules["folder_paths"].models_dir = sys.argv[3]
sys.modules["folder_paths"].add_model_folder_path = lambda name, path: None
sys.path.insert(0, sys.argv[1])
import pack
from sd_hyena.students.checkpoint import describe, load_students
from sd_hyena.sites import Site
report = importlib.import_module("pack.report").report
file = load_students(sys.argv[3] + "/one.safetensors")
print(describe(file).splitlines()[0], report([Site("", "IN01", 32, 2, 0)], file, 1024, 1024).splitlines()[-1])
"""


def gathered(folder):
    runpy.run_path(ROOT / "comfyui" / "gather.py")["gather"](folder)


def cloned(folder):
    leave = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", "out", "logs", "model", "docs", "results", ".*_cache"
    )
    shutil.copytree(ROOT, folder, ignore=leave)


@pytest.mark.parametrize("how, name", [(gathered, "hyena"), (cloned, "sd_hyena")])
def test_it_loads_where_it_is_cloned_or_gathered_without_anything_installed(shared_pipe, tmp_path, how, name):
    """Also from a clone of the very name of the package within it; and no folder of ours gets onto the search path."""
    try:
        engine.fetched()
    except engine.NotToBeHad as error:
        pytest.skip(f"no ComfyUI to test in: {error}")
    how(tmp_path / "custom_nodes" / name)
    (tmp_path / "models" / "hyena").mkdir(parents=True)
    save_students(
        tmp_path / "models" / "hyena" / "one.safetensors", StudentFile(models.students_of(shared_pipe.unet, "IN01"), {})
    )
    code = [
        sys.executable,
        "-c",
        IN_THE_ENGINE,
        str(ROOT / "tests" / "comfyui" / "engine.py"),
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    nodes, text, *files, stray, on_the_path = json.loads(done.stdout.splitlines()[-1])
    assert nodes == [f"Hyena{name}" for name in sorted(IDS)]
    assert "IN01" in text and all(file.startswith(str(tmp_path / "custom_nodes" / name)) for file in files)
    assert not stray and not on_the_path


IDS = (
    "LoadStudents",
    "ApplyStudents",
    "ApplyLandmarks",
    "ModelInfo",
    "VAEDecode",
    "VAEEncode",
)  # in people's workflows: never changed


def required(distribution):
    """A distribution and all that it needs, as names of modules."""
    todo, found = [distribution], set()
    while todo:
        name = todo.pop()
        try:
            known = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            todo += [re.match(r"[\w.-]+", line)[0] for line in known.requires or () if "extra ==" not in line]
    of = importlib.metadata.packages_distributions()
    alike = {re.sub(r"[-_.]+", "-", name).lower() for name in found}
    return {module for module, names in of.items() if alike & {re.sub(r"[-_.]+", "-", name).lower() for name in names}}


def test_it_imports_nothing_but_torch_einops_safetensors_numpy_and_tqdm(shared_pipe, tmp_path):
    gathered(tmp_path / "pack")
    save_students(tmp_path / "one.safetensors", StudentFile(models.students_of(shared_pipe.unet, "IN01"), {}))
    allowed = " ".join(set().union(*map(required, LIGHT)))
    assert not {"diffusers", "transformers", "lightning", "PIL", "yaml", "jsonargparse"} & set(allowed.split())
    code = [sys.executable, "-c", WITHOUT_THE_ENGINE, str(tmp_path), allowed, str(tmp_path)]
    done = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "IN01  hyena2d" in done.stdout and "times cheaper" in done.stdout


def test_one_file_imports_comfyui():
    importing = {
        path.name
        for path in (ROOT / "comfyui").glob("*.py")
        if re.search(r"^\s*(from|import) (comfy|folder_paths|nodes|execution|server)\b", path.read_text(), re.MULTILINE)
    }
    assert importing == {"engine.py"}
