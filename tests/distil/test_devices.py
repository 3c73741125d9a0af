"""A run shared by two processes is the run of one: same samples, same weights, one folder, one set of files."""

import os
import shutil
import signal
import socket
import time
from contextlib import suppress

import pytest
import torch

from sd_hyena.distil import training
from sd_hyena.distil.module import PATIENCE, Distillation
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.checkpoint import load_students
from tests.conftest import IN01, ROOT
from tests.distil.test_training import curve
from tests.faults.conftest import TRAIN, ended, start
from tests.fork import forked, started

OPTIONS = (
    "-W 64 -n 6 -b 4 --num_samples 4 --sample_steps 2 --operator_options emb_dim=5 -r 1e-2 --warmup_steps 2".split()
)
OPTIONS += "--validate_every_n_steps 3 -s 0 --device cpu --operator".split()


def arguments(folder, operator, *more):
    return ["train.py", *OPTIONS, operator, "-o", folder / "out", "-l", folder / "logs", *more]


@pytest.mark.parametrize(
    "operator, more", [("bidirectional", []), pytest.param("safari", ["--ema", "0.8"], marks=pytest.mark.slow)]
)
def test_two_processes_train_the_same_student_as_one(folder, tmp_path_factory, operator, more):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder / "out" / "cache", alone / "out" / "cache")
    one = ended(alone, TrainConfig, *OPTIONS, operator, "-d", 3, "--micro_batch_size", 2, *more)
    assert one.code == 0, one.err
    expected = load_students(alone / "out" / "hyena.safetensors").students[IN01].state_dict()
    two = forked(*arguments(folder, operator, "-d", 3, "--devices", 2, *more), cwd=ROOT)
    assert two.returncode == 0, two.stderr
    weights = load_students(folder / "out" / "hyena.safetensors").students[IN01].state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
    assert two.stdout.count("watch it:") == two.stdout.count("next: ") == 1
    (run,) = [path for path in (folder / "out").iterdir() if (path / "config.yaml").exists()]
    assert len(list((run / "checkpoints").iterdir())) == 1
    for tag in ("train/loss/IN01", "val/relative_mse/IN01"):
        assert [step for step, _ in curve(folder, tag)] == [step for step, _ in curve(alone, tag)]
        for (_, ours), (_, theirs) in zip(curve(folder, tag), curve(alone, tag), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.gate
def test_a_signal_to_one_process_ends_both_with_a_checkpoint_that_one_process_goes_on_from(folder):
    given = arguments(folder, "bidirectional", "--devices", 2, "-n", 5000, "-s", 5, "--keep", 1)
    process = started(*given, cwd=ROOT)
    deadline = time.monotonic() + 600
    while not any((folder / "out").glob("*/checkpoints/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    done = process.end(signal.SIGTERM)
    assert done.code == 143, done.err
    (saved,) = (folder / "out").glob("*/checkpoints/*.ckpt")
    seed = torch.load(saved, weights_only=True)["sd_hyena"]["config"]["seed"]
    assert seed >= 0  # -1 was drawn once, for both
    step = int(saved.stem.removeprefix("step-"))
    result = forked(*arguments(folder, "bidirectional", "--devices", 1, "-n", step + 1, "--resume", "auto"), cwd=ROOT)
    assert result.returncode == 0 and "changed on resume: devices 2 -> 1" in result.stdout, result.stderr


def test_a_process_of_another_launcher_is_refused(tmp_path):
    launched = lambda: os.environ.update(LOCAL_RANK="1", WORLD_SIZE="2")
    refused = ended(tmp_path, TrainConfig, *OPTIONS, "causal", fault=launched)
    assert refused.code == 2 and "another launcher" in refused.last_line


@pytest.mark.parametrize(
    "more, rule",
    [
        (["--devices", "3"], "must divide batch_size=4"),
        (["--devices", "2", "--micro_batch_size", "4"], "must divide batch_size=4 / devices=2"),
        (["--devices", "2", "--device", "cuda:1"], "leave the number away"),
    ],
)
def test_devices_that_cannot_share_the_batch_are_refused(tmp_path, more, rule):
    done = ended(tmp_path, TrainConfig, *arguments(tmp_path, "causal", *more)[1:])
    assert done.code == 2 and rule in done.err and done.err.count("\n") == 1, done.err


@pytest.mark.parametrize(
    "failure", [pytest.param("torch.OutOfMemoryError('injected')", marks=pytest.mark.slow), "ValueError('injected')"]
)
def test_one_process_that_fails_ends_the_other_without_a_hang(folder, tmp_path, failure):
    script = tmp_path / "failing.py"
    script.write_text(
        "import os, sys, torch\n"
        "from sd_hyena.options.command import run\n"
        "from sd_hyena.options.train_config import TrainConfig\n"
        "from sd_hyena.distil.module import Distillation\n"
        "original = Distillation.training_step\n"
        "def step(self, batch, batch_idx):\n"
        "    if self.global_step == 1 and os.environ.get('LOCAL_RANK') == '1':\n"
        f"        raise {failure}\n"
        "    return original(self, batch, batch_idx)\n"
        "Distillation.training_step = step\n"
        "from sd_hyena.distil.__main__ import main\n"
        "sys.exit(run(TrainConfig, main))\n"
    )
    given = arguments(folder, "bidirectional", "--devices", 2, "-n", 50)[1:]
    done = forked(script, *given, cwd=ROOT)
    assert done.returncode != 0 and "injected" in done.stderr


def free_ports() -> int:
    """A port that is free, and the one after it."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            with suppress(OSError):
                other.bind(("127.0.0.1", one.getsockname()[1] + 1))
                return one.getsockname()[1]


def machines(folder, *arguments, fault=lambda node: None):
    """Two machines of one process each, as their users start them; how each ended."""
    port, children = free_ports(), []
    for node in (1, 0):  # the one that has to wait comes first
        own = folder / f"machine-{node}"
        own.mkdir()

        def started(node=node):
            signal.alarm(200)  # no test waits for one that hangs
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), NODE_RANK=str(node))
            fault(node)

        given = [*TRAIN, "--num_nodes", 2, "--device", "cpu", "-o", folder / "out", "-l", folder / "logs", *arguments]
        children.append(start(own, TrainConfig, *given, fault=started))
    second, first = (child.end() for child in children)
    return first, second


@pytest.mark.gate
def test_two_machines_train_the_student_of_one_and_the_first_one_speaks(folder, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone")
    shutil.copytree(folder / "out" / "cache", alone / "out" / "cache")
    assert ended(alone, TrainConfig, *TRAIN, "--micro_batch_size", 3).code == 0
    first, second = machines(folder)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == "" and first.out.count("next: ") == 1
    assert len([path for path in (folder / "out").iterdir() if (path / "config.yaml").exists()]) == 1
    ours, theirs = (
        load_students(one / "out" / "hyena.safetensors").students[IN01].state_dict() for one in (folder, alone)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.gate
def test_numbers_of_one_machine_that_are_not_finite_reach_the_weights_of_none_and_stop_both(folder):
    """Each takes the other's gradients, so both pass over the same steps."""

    def fault(node):
        original = Distillation.training_step

        def step(self, batch, batch_idx):
            loss = original(self, batch, batch_idx)
            return loss * float("nan") if node == 1 and self.global_step >= 4 else loss

        Distillation.training_step = step

    first, second = machines(folder, "-n", 4 + 2 * PATIENCE, fault=fault)
    assert (first.code, second.code) == (1, 1), first.err + second.err
    said = [line for one in (first, second) for line in one.err.splitlines() if line.startswith("error: ")]
    assert said and all(f"not finite for {PATIENCE} steps" in line for line in said)
    (newest, *_) = sorted((folder / "out").glob("*/checkpoints/*"), reverse=True)
    state = torch.load(newest, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.gate
def test_a_machine_whose_first_one_dies_before_the_run_begins_ends_too(folder):
    arrived = folder / "arrived"

    def fault(node):
        class Seen(torch.distributed.TCPStore):
            def wait(self, *arguments):
                arrived.touch()
                return super().wait(*arguments)

        def die(*_):
            while not arrived.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

        if node == 0:
            training.make_bank = die
        else:
            torch.distributed.TCPStore = Seen

    first, second = machines(folder, fault=fault)
    assert first.code == -signal.SIGKILL and second.code == 1
    assert second.last_line == "error: RuntimeError: the first machine has ended before the run began"


@pytest.mark.parametrize(
    "environment, more, said",
    [
        ({}, ["--num_nodes", 2], "needs MASTER_ADDR, MASTER_PORT, NODE_RANK"),
        ({"NODE_RANK": "1"}, ["--devices", 2], "NODE_RANK=1 is set, but num_nodes=1"),
        (dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", NODE_RANK="2"), ["--num_nodes", 2], "one from 0 to 1"),
        ({}, ["--num_nodes", 4], "devices=1 x num_nodes=4 must divide batch_size=6"),
    ],
)
def test_machines_that_cannot_meet_are_refused_in_one_line(tmp_path, environment, more, said):
    done = ended(tmp_path, TrainConfig, *TRAIN, "--device", "cpu", *more, fault=lambda: os.environ.update(environment))
    assert done.code == 2 and said in done.err and done.err.count("\n") == 1, done.err
