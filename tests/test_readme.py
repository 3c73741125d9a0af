"""Every command of the README is run as it stands, in a copy of the repository, with flags behind it that make it small."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sd_hyena.options.command_line import from_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from tests import silence
from tests.conftest import ROOT
from tests.fork import python_that_forks

SMALLER = {  # what is put behind a command, by how it begins; None: run elsewhere, for the reason given
    "bash examples/demo.sh": "-n 1 -W 64 -b 2 --num_samples 2 --sample_steps 1",
    "python -m sd_hyena.demo": "-n 1 -W 64 -b 2 --num_samples 2 --sample_steps 1",
    "bash examples/train.sh": "-n 1 -W 64 -b 2 --num_samples 2 --sample_steps 1",
    "python train.py": "-n 1 -W 64 -b 2 --num_samples 2 --sample_steps 1",
    "bash examples/generate.sh -y landmarks": "-W 256 -s 1 -n 1",  # smaller they are attention itself
    "bash examples/generate.sh": "-W 64 -s 1 -n 1",
    "python generate.py": "-W 64 -s 1 -n 1",
    "bash examples/ui.sh": None,  # a server; tests/ui
    "python -m sd_hyena.students.checkpoint": "",
    "python -m sd_hyena.evaluate": "--images 1 --states 1 --steps 1 --sizes 64 --guidance 1",
    "python -m sd_hyena.recipe": "-n 1 -W 64 -b 2 --num_samples 2 --sample_steps 1 --validate_every_n_steps 0",
    "bash tests/run.sh": None,  # this very run
    "python3 -m venv": None,  # test_install.py
    "pip install": None,
    "sd-hyena": None,
    "tensorboard": None,  # a server; its files are read in test_training.py
    "python -m benchmarks": None,  # minutes; CONTRIBUTING.md says how
    "python -m examples.tiny_sd": None,  # hours
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_command_is_of_a_known_kind():
    assert len(commands()) >= 6
    for line in commands():
        assert any(line.startswith(known) for known in SMALLER), line


def test_whether_a_command_is_silent_is_watched_of_each_that_computes():
    watched = [shlex.join(arguments) for arguments in silence.commands()]
    for line in commands():
        if line.startswith(("python ", "bash examples/")) and "path/to" not in line and "ui.sh" not in line:
            assert any(given.endswith(" ".join(line.split()[2:])) for given in watched), line
    assert len(watched) == len(set(watched)) and any("--dry_run" in given for given in watched)


@pytest.fixture(scope="module")
def environment_made():
    """The markers of an environment that the scripts find complete."""
    markers = [Path(sys.prefix) / f"installed-requirements{name}.txt" for name in ("", "-ui", "-dev")]
    if not all(marker.exists() for marker in markers):
        pytest.skip("not in the environment that tests/run.sh makes")
    return markers


def test_the_commands_run_in_order_as_typed(tmp_path, environment_made, shared_pipe):
    """Whatever says `python` gets a fork of this process, which spares the seconds of importing; all else is as typed."""
    tree = tmp_path / "copy"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "out", "logs", "__pycache__"))
    bin_ = tree / ".venv" / "bin"
    bin_.mkdir(parents=True)
    for marker in environment_made:
        shutil.copy(marker, bin_.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin_}:{os.environ['PATH']}"}
    env.pop("SD_HYENA_VENV", None)  # which would name a python that does not fork
    with python_that_forks(bin_ / "python") as inherited:
        for line in commands():
            smaller = next(small for known, small in SMALLER.items() if line.startswith(known))
            if smaller is None or "path/to" in line:
                continue
            given = shlex.split(line) + shlex.split(smaller)
            done = subprocess.run(
                given, cwd=tree, env=env, pass_fds=[inherited], capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("script", ["demo", "generate", "train", "ui"])
def test_the_scripts_start_the_python_of_their_environment(tmp_path, environment_made, script):
    (tmp_path / "venv").symlink_to(sys.prefix)
    given = ["bash", ROOT / "examples" / f"{script}.sh", "--help"]
    env = {**os.environ, "SD_HYENA_VENV": str(tmp_path / "venv")}
    done = subprocess.run(given, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--out_dir" in done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("[gt]*/*.yaml")), ids=lambda p: p.stem)
def test_every_config_file_is_valid_and_says_how_to_run_it(path):
    config_class = {"train": TrainConfig, "generate": GenerateConfig}[path.parent.name]
    from_dict(config_class, yaml.safe_load(path.read_text()))
    assert f"python {path.parent.name}.py --config {path.relative_to(ROOT)}" in path.read_text()


def test_every_file_that_the_documents_name_exists():
    for document in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
        *ROOT.glob("examples/*/README.md"),
    ]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_test_that_the_documents_name_exists():
    named = [pair for path in ROOT.glob("docs/*.md") for pair in re.findall(r"`([\w/]+\.py)::(\w+)`", path.read_text())]
    assert len(named) > 50
    texts = {file: (ROOT / "tests" / file).read_text("utf-8") for file, _ in named}
    for file, name in named:
        assert len(re.findall(rf"^def {name}\(", texts[file], re.MULTILINE)) == 1, f"{file}::{name}"


def test_every_feature_held_against_the_peers_names_its_test():
    page = (ROOT / "docs" / "large-images.md").read_text()
    table = page.split("## Against the four")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= 20
    for row in rows:
        assert "::test_" in row.strip("| ").split("|")[-1], row
