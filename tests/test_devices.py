"""A run shared by two processes is the run of one: same samples, same weights, one folder, one set of files."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from sd_hyena.checkpoint import load_students
from tests.conftest import IN01, ROOT, command
from tests.test_training import curve

OPTIONS = "-W 64 -n 6 -b 4 --num_samples 4 --sample_steps 2 --hyena_emb_dim 5 -r 1e-2 --warmup_steps 2".split()
OPTIONS += "--validate_every_n_steps 3 -s 0 --device cpu --operator".split()


def arguments(folder, operator, *more):
    return ["train.py", *OPTIONS, operator, "-o", folder / "out", "-l", folder / "logs", *more]


def trained(folder, operator, *more):
    result = command(*arguments(folder, operator, "-d", 3, *more), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return load_students(folder / "out" / "hyena.safetensors").students[IN01].state_dict(), result.stdout


@pytest.mark.parametrize("operator, more", [("bidirectional", []), ("safari", ["--ema", "0.8"])])
def test_two_processes_train_the_same_student_as_one(folder, tmp_path_factory, operator, more):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder / "out" / "cache", alone / "out" / "cache")
    expected, _ = trained(alone, operator, "--micro_batch_size", 2, *more)
    weights, printed = trained(folder, operator, "--devices", 2, *more)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert printed.count("watch it:") == printed.count("next: ") == 1
    (run,) = [path for path in (folder / "out").iterdir() if (path / "config.yaml").exists()]
    assert len(list((run / "checkpoints").iterdir())) == 1
    for tag in ("train/loss/IN01", "val/relative_mse/IN01"):
        assert [step for step, _ in curve(folder, tag)] == [step for step, _ in curve(alone, tag)]
        for (_, ours), (_, theirs) in zip(curve(folder, tag), curve(alone, tag), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_signal_to_one_process_ends_both_with_a_checkpoint_that_one_process_goes_on_from(folder):
    given = [str(a) for a in arguments(folder, "bidirectional", "--devices", 2, "-n", 5000, "-s", 5, "--keep", 1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *given], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not any((folder / "out").glob("*/checkpoints/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    (saved,) = (folder / "out").glob("*/checkpoints/*.ckpt")
    seed = torch.load(saved, weights_only=True)["sd_hyena"]["config"]["seed"]
    assert seed >= 0  # -1 was drawn once, for both
    step = int(saved.stem.removeprefix("step-"))
    result = command(*arguments(folder, "bidirectional", "-n", step + 1, "--resume", "auto"), cwd=ROOT)
    assert result.returncode == 0 and "changed on resume: devices 2 -> 1" in result.stdout, result.stderr


def test_a_process_of_another_launcher_is_refused(tmp_path):
    result = command(*arguments(tmp_path, "pointwise"), env={"LOCAL_RANK": "1", "WORLD_SIZE": "2"})
    assert result.returncode == 2 and "another launcher" in result.stderr


@pytest.mark.parametrize(
    "more, rule",
    [
        (["--devices", "3"], "must divide batch_size=4"),
        (["--devices", "2", "--micro_batch_size", "4"], "must divide batch_size=4 / devices=2"),
        (["--devices", "2", "--device", "cuda:1"], "leave the number away"),
    ],
)
def test_devices_that_cannot_share_the_batch_are_refused(tmp_path, more, rule):
    result = command(*arguments(tmp_path, "pointwise", *more))
    assert result.returncode == 2 and rule in result.stderr and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("failure", ["torch.OutOfMemoryError('injected')", "ValueError('injected')"])
def test_one_process_that_fails_ends_the_other_without_a_hang(folder, tmp_path, failure):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys, torch\n"
        "from sd_hyena.command import run\n"
        "from sd_hyena.config import TrainConfig\n"
        "from sd_hyena.distill import Distillation\n"
        "original = Distillation.training_step\n"
        "def step(self, batch, batch_idx):\n"
        "    if self.global_step == 1 and os.environ.get('LOCAL_RANK') == '1':\n"
        f"        raise {failure}\n"
        "    return original(self, batch, batch_idx)\n"
        "Distillation.training_step = step\n"
        "from train import main\n"
        "sys.exit(run(TrainConfig, main))\n"
    )
    given = arguments(folder, "bidirectional", "--devices", 2, "-n", 50)[1:]
    done = command(script, *given, timeout=120)
    assert done.returncode != 0 and "injected" in done.stderr
