"""The commands as a user types them: exit codes, one line on stderr, nothing heavy loaded before bad input is answered."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sd_hyena.config import SHIPPED_MODEL
from tests.conftest import ROOT, command

SMALL = "-W 64 -b 2 --num_samples 2 --sample_steps 2 --validate_every_n_steps 0 -d 1".split()


def one_line(done: subprocess.CompletedProcess) -> str:
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
    return done.stderr


COMMANDS = {
    "train.py": "--width",
    "generate.py": "--width",
    "sd_hyena.demo": "--width",
    "sd_hyena.doctor": "--model",
    "sd_hyena.evaluation": "--sizes",
    "sd_hyena.model_card": "--push",
    "sd_hyena.recipe": "python -m sd_hyena.recipe FILE",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_without_loading_anything_heavy(name):
    """A second of CPU at most; numbers of seconds are the machine's, so what is loaded stands for them."""
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    how = f"run_path('{name}'" if name.endswith(".py") else f"run_module('{name}', alter_sys=True"
    code += f"try: runpy.{how}, run_name='__main__')\nexcept SystemExit as e: assert not e.code, e.code\n"
    code += "heavy = {'torch', 'diffusers', 'transformers', 'lightning', 'PIL', 'huggingface_hub'}\n"
    code += "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    done = command("-c", code)
    assert done.returncode == 0 and COMMANDS[name] in done.stdout, done.stderr


@pytest.mark.parametrize(
    "arguments", [["train.py", "-W", "65"], ["generate.py", "-y", "/nowhere.pt"], ["train.py", "--foo"]]
)
def test_bad_options_exit_2_with_one_line_before_torch_is_loaded(arguments):
    done = command("-X", "importtime", *arguments)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_a_model_that_is_none_is_named_with_what_is_accepted(tmp_path):
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02" + b"x" * 100)
    for name, word in (("missing", "does not exist"), ("empty.safetensors", "empty"), ("folder", "model_index.json")):
        said = one_line(command("generate.py", "-m", tmp_path / name))
        assert word in said and "diffusers folder" in said
    assert "looks like a PyTorch pickle" in one_line(command("train.py", "-m", tmp_path / "pickle.safetensors"))


def test_an_output_folder_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    for arguments in (
        ["train.py", "-o", tmp_path / "file"],
        ["train.py", "-l", "/proc/x"],
        ["generate.py", "-o", tmp_path / "file"],
    ):
        done = command("-X", "importtime", *arguments)
        assert done.returncode == 2 and re.search("^error: .*name a folder you own$", done.stderr, re.MULTILINE)
        assert "diffusers.pipelines.stable_diffusion" not in done.stderr


def test_an_unknown_target_lists_the_sites(tmp_path):
    done = command("train.py", "-t", "IN03", *SMALL, "-o", tmp_path / "out", "-l", tmp_path / "logs")
    assert done.returncode == 2 and "IN01 IN02" in one_line(done)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = command("train.py", "--device", "cuda", "-o", tmp_path)
    assert done.returncode == 2 and "try auto or cpu" in one_line(done)


def test_debug_shows_the_traceback():
    done = command("train.py", "-W", "65", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


def test_train_then_generate_work_as_typed_without_a_network(tmp_path):
    """Every socket is blocked, $HOME is read-only, the locale is C, the paths have spaces and umlauts."""
    block = tmp_path / "sitecustomize.py"
    block.write_text("import socket\ndef no(*a, **k): raise OSError('no network')\nsocket.socket.connect = no\n")
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(home), "LANG": "C", "LC_ALL": "C"}
    folder = tmp_path / "größe zwei"
    trained = command(
        "train.py", "-t", "in01", "-n", "4", "-s", "2", *SMALL, "-o", folder, "-l", folder / "logs", env=env
    )
    assert trained.returncode == 0, trained.stderr
    for word in ("estimate:", "tensorboard --logdir", "IN01: relative error", "next: python generate.py"):
        assert word in trained.stdout
    drawn = command(
        "generate.py", "-y", folder / "hyena.pt", "-W", 64, "-s", 2, "-n", 2, "--compare", "-o", folder, env=env
    )
    assert drawn.returncode == 0, drawn.stderr
    names = ["image_000.png", "image_000-compare.png", "image_001.png", "image_001-compare.png"]
    assert [line.rsplit("/", 1)[1] for line in drawn.stdout.splitlines() if line.endswith(".png")] == names


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits_with_its_code_and_resume_finishes(tmp_path, number, code):
    rest = ["-s", "0", *SMALL, "-o", str(tmp_path / "out"), "-l", str(tmp_path / "logs")]
    arguments = ["train.py", "-n", "20000", *rest]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    said = tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=env, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while "50/20000" not in said.read_text() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(timeout=120) == code and "go on with --resume" in said.read_text()
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoints/step-*.ckpt")
    step = int(checkpoint.stem.split("-")[1])
    assert 0 < step < 20000
    again = command("train.py", "-n", str(step + 2), *rest, "--resume", "auto")
    assert again.returncode == 0, again.stderr
    assert sorted(p.stem for p in checkpoint.parent.glob("*.ckpt"))[-1] == f"step-{step + 2:05d}"


def test_the_shipped_model_is_small_enough_to_ship():
    size = sum(path.stat().st_size for path in SHIPPED_MODEL.glob("**/*") if path.is_file())
    assert size <= 24 * 2**20
