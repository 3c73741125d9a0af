"""The commands as a user types them: exit codes, one line on stderr, nothing heavy loaded before bad input is answered."""

import re
import signal
import sys
import time

import pytest
import torch

from sd_hyena.distil import training
from sd_hyena.generate import generation
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from tests.conftest import ROOT, command
from tests.faults.conftest import ended
from tests.fork import forked, started
from tests.gate import gated

SMALL = "-W 64 -b 2 --num_samples 2 --sample_steps 2 --validate_every_n_steps 0 -d 1".split()


COMMANDS = {
    "train.py": "--width",
    "generate.py": "--width",
    "sd_hyena.demo": "--width",
    "sd_hyena.doctor": "--model",
    "sd_hyena.evaluate": "--sizes",
    "sd_hyena.evaluate.card": "--push",
    "sd_hyena.recipe": "python -m sd_hyena.recipe FILE",
}


@pytest.mark.parametrize("name", ["train.py", "generate.py", *gated(n for n in COMMANDS if not n.endswith(".py"))])
def test_help_lists_every_option_without_loading_anything_heavy(name):
    """A second of CPU at most; numbers of seconds are the machine's, so what is loaded stands for them."""
    code = "import sys, runpy; sys.argv = ['x', '--help']\n"
    how = f"run_path('{name}'" if name.endswith(".py") else f"run_module('{name}', alter_sys=True"
    code += f"try: runpy.{how}, run_name='__main__')\nexcept SystemExit as e: assert not e.code, e.code\n"
    code += "heavy = {'torch', 'diffusers', 'transformers', 'lightning', 'PIL', 'huggingface_hub', 'gradio', 'sd_hyena.ui'}\n"
    code += "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    done = command("-c", code)
    assert done.returncode == 0 and COMMANDS[name] in done.stdout, done.stderr


BAD = {  # what is typed, at a folder of such files -> what is answered
    "train.py -W 65": "multiple of 8",
    "train.py --foo": "--foo",
    "train.py -m missing": "model 'missing' does not exist; give a diffusers folder",
    "train.py -m empty.safetensors": "is an empty file; give a diffusers folder",
    "train.py -m empty": "has no model_index.json; give a diffusers folder",
    "train.py -m damaged": "model_index.json is damaged",
    "train.py -m lora.safetensors": "looks like a LoRA; give it as --lora",
    "train.py -m pickle.safetensors": "looks like a PyTorch pickle",
    "train.py -m lora.txt": "expected a .safetensors or .ckpt file",
    "train.py --vae lora.safetensors": "vae='lora.safetensors' looks like a LoRA",
    "train.py -p missing": "pretrained_weight='missing' is no file",
    "train.py --prompts missing": "prompts='missing' is no file",
    "train.py --resume missing": "resume='missing' is no checkpoint",
    "train.py -o lora.txt/out": "out_dir='lora.txt/out' cannot be written to (Not a directory)",
    "generate.py -m missing": "model 'missing' does not exist; give a diffusers folder",
    "generate.py -y lora.txt+missing": "hyena='missing' is no file",
    "generate.py --vae missing": "vae='missing' does not exist",
    "generate.py --lora lora.safetensors,missing:0.5": "lora='missing:0.5' is no file",
    "generate.py --lora damaged.safetensors": "not a valid safetensors file: 'damaged.safetensors'",
    "generate.py --embeddings lora.txt": "embeddings='lora.txt' is no folder and no file that ends in",
    "generate.py --controlnet empty --control_image lora.txt": "controlnet='empty' has no readable config.json",
    "generate.py --controlnet empty --control_image missing": "control_image='missing' is no file",
    "generate.py --init_image missing": "init_image='missing' is no file",
    "generate.py --regions missing": "regions='missing' is no file",
    "sd_hyena.evaluate lora.txt -m missing": "model 'missing' does not exist",
    "sd_hyena.evaluate missing": "students='missing' is no file",
    "sd_hyena.evaluate": "no students given",
    "sd_hyena.evaluate lora.txt --judge nowhere:x": "judge='nowhere:x' cannot be imported",
    "generate.py -o lora.txt": "out_dir='lora.txt' cannot be written to (Not a directory); name a folder you own",
}


def test_bad_input_is_answered_in_one_line_each_before_torch_is_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "model_index.json").write_text("[")
    (tmp_path / "lora.txt").write_text("x")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x02" + b"x" * 100)
    header = b'{"lora_unet_x.lora_down.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    for name, text in (("lora", header), ("damaged", b'{"a":1,"a":2}')):
        (tmp_path / f"{name}.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    code = (
        "import runpy, sys\nheavy = {'torch', 'diffusers', 'transformers', 'lightning'}\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = line.split()\n"
        "    name = sys.argv[0]\n"
        "    try:\n"
        f"        if name.endswith('.py'): runpy.run_path(r'{ROOT}/' + name, run_name='__main__')\n"
        "        else: runpy.run_module(name, run_name='__main__', alter_sys=True)\n"
        "    except SystemExit as end: print(end.code)\n"
        "    assert not heavy & sys.modules.keys(), line\n"
    )
    done = command("-c", code, *BAD, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert done.stdout.split() == ["2"] * len(BAD) == ["2"] * len(said)
    for typed, line in zip(BAD, said, strict=True):
        assert line.startswith("error: ") and BAD[typed] in line, (typed, line)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for config_class, flag, folder in (
        (TrainConfig, "-l", "/proc/x"),
        (TrainConfig, "-o", "loop"),
        (GenerateConfig, "-o", "loop/x"),
    ):
        module = training if config_class is TrainConfig else generation
        done = ended(
            tmp_path, config_class, flag, folder, fault=lambda module=module: setattr(module, "load_pipeline", None)
        )
        assert done.code == 2 and re.fullmatch("error: .*name a folder you own\n", done.err), done.err


def test_an_unknown_target_lists_the_sites(tmp_path):
    done = ended(tmp_path, TrainConfig, "-t", "IN03", *SMALL)
    assert done.code == 2 and re.fullmatch("error: .*IN01 IN02.*", done.last_line), done.err


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = ended(tmp_path, TrainConfig, "--device", "cuda")
    assert done.code == 2 and re.fullmatch("error: .*try auto or cpu\n", done.err), done.err


def test_debug_shows_the_traceback():
    done = command("train.py", "-W", "65", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.gate
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
    for word in ("estimate:", "tensorboard --logdir", "IN01: relative error", "next: python -m sd_hyena generate"):
        assert word in trained.stdout
    drawn = command(
        "generate.py", "-y", folder / "hyena.pt", "-W", 64, "-s", 2, "-n", 2, "--compare", "-o", folder, env=env
    )
    assert drawn.returncode == 0, drawn.stderr
    strange = [line for line in drawn.stderr.splitlines() if not line.startswith(("loading ", "drawing: "))]
    assert not strange  # whatever the installed libraries have to say of themselves
    names = ["image_000.png", "image_000-compare.png", "image_001.png", "image_001-compare.png"]
    assert [line.rsplit("/", 1)[1] for line in drawn.stdout.splitlines() if line.endswith(".png")] == names


@pytest.mark.gate
@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_exits_with_its_code_and_resume_finishes(tmp_path, number, code):
    rest = ["-s", "0", *SMALL, "-o", str(tmp_path / "out"), "-l", str(tmp_path / "logs")]
    process = started("train.py", "-n", "20000", *rest, cwd=ROOT)
    deadline = time.monotonic() + 120
    while "/20000, " not in process.said() and time.monotonic() < deadline:
        time.sleep(0.2)
    done = process.end(number)
    assert done.code == code and "go on with --resume" in done.out + done.err
    (checkpoint,) = (tmp_path / "out").glob("*/checkpoints/step-*.ckpt")
    step = int(checkpoint.stem.split("-")[1])
    assert 0 < step < 20000
    again = forked("train.py", "-n", str(step + 2), *rest, "--resume", "auto", cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert sorted(p.stem for p in checkpoint.parent.glob("*.ckpt"))[-1] == f"step-{step + 2:05d}"


def test_the_shipped_model_is_small_enough_to_ship():
    size = sum(path.stat().st_size for path in SHIPPED_MODEL.glob("**/*") if path.is_file())
    assert size <= 24 * 2**20
