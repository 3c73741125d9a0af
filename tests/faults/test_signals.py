"""Signals in the wrong moment: what is on disk is whole, and a run goes on as if nothing had been."""

import hashlib
import os
import random
import shutil
import signal
import time

import pytest
import torch

from sd_hyena.distil import pieces
from sd_hyena.distil.module import Distillation
from sd_hyena.files.names import writable_folder
from sd_hyena.files.weights import read_pickle
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.checkpoint import load_students
from tests.conftest import IN01
from tests.faults.conftest import GENERATE, TRAIN, ended, litter, start


def kill_ourselves(monkeypatch, where, name: str, *numbers: int, when=lambda *_: True, marker=None):
    """Send ourselves these signals where a function begins, once."""
    original, left = getattr(where, name), list(numbers)

    def killing(*args, **kwargs):
        while left and when(*args):
            os.kill(os.getpid(), left.pop(0))
        if marker is not None and not left:
            marker.touch()
        return original(*args, **kwargs)

    monkeypatch.setattr(where, name, killing)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_students(folder / "out" / "hyena.safetensors").students[IN01].state_dict()


def assert_equal_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_second_ctrl_c_ends_the_run_within_the_step(folder, monkeypatch):
    in_step = lambda module, *_: module.trainer.global_step == 4
    went_on = folder / "went on"
    with monkeypatch.context() as patch:
        twice = signal.SIGINT, signal.SIGINT
        kill_ourselves(patch, Distillation, "training_step", *twice, when=in_step, marker=went_on)
        done = ended(folder, TrainConfig, *TRAIN, "--validate_every_n_steps", 0)
    assert done.code == 130 and done.last_line == "interrupted" and not went_on.exists()
    names = sorted(path.name for path in (folder / "out").glob("*/checkpoints/*"))
    assert names == ["step-00002.ckpt", "step-00004.ckpt"] and litter(folder) == []
    assert ended(folder, TrainConfig, *TRAIN, "--validate_every_n_steps", 0, "-n", 5, "--resume", "auto").code == 0


def test_a_run_that_is_stopped_before_it_saved_anything_leaves_no_folder(folder, monkeypatch):
    in_step = lambda module, *_: module.trainer.global_step == 1
    with monkeypatch.context() as patch:
        kill_ourselves(patch, Distillation, "training_step", signal.SIGINT, signal.SIGINT, when=in_step)
        done = ended(folder, TrainConfig, *TRAIN, "-s", 0)
    assert done.code == 130
    assert [path.name for path in (folder / "out").iterdir()] == ["cache"] and not (folder / "logs").exists()


@pytest.mark.gate
@pytest.mark.parametrize(
    "number, code", [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_while_the_teacher_draws_its_samples_ends_the_run_and_keeps_whole_pictures_alone(
    tmp_path, monkeypatch, number, code
):
    with monkeypatch.context() as patch:
        kill_ourselves(patch, pieces, "save_file", number, when=lambda _, path, __: "00001" in path.name)
        done = ended(tmp_path, TrainConfig, *TRAIN, "-n", 2)
    assert done.code == code and "Traceback" not in done.err and litter(tmp_path) == []
    pictures = [path.name for path in tmp_path.glob("out/cache/*/*") if path.name != "lock"]
    assert pictures == ["00000.safetensors"] and not (tmp_path / "out" / "hyena.pt").exists()
    assert ended(tmp_path, TrainConfig, *TRAIN, "-n", 2).code == 0


def test_a_signal_while_images_are_drawn_keeps_those_that_are_done(tmp_path):
    child = start(tmp_path, GenerateConfig, *GENERATE, "-n", 500)
    while not (tmp_path / "out" / "image_002.png").exists():
        time.sleep(0.01)
    done = child.end(signal.SIGTERM)
    pictures = sorted((tmp_path / "out").iterdir())
    assert done.code == 143 and done.last_line == "terminated" and 3 <= len(pictures) < 500
    whole = [path.read_bytes() for path in pictures]
    assert all(content.startswith(b"\x89PNG") and content[-8:-4] == b"IEND" for content in whole)


def digest(checkpoint: dict) -> str:
    """Of the weights, the optimiser's numbers and the step."""
    said = hashlib.sha256(str(checkpoint["global_step"]).encode())
    for tensor in _tensors([checkpoint["state_dict"], checkpoint["optimizer_states"]]):
        said.update(tensor.contiguous().numpy().tobytes())
    return said.hexdigest()


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _tensors(part)


def digests(folder) -> dict[str, str]:
    """Of every checkpoint that is there, by its name."""
    return {path.name: digest(read_pickle(path)) for path in (folder / "out").glob("*/checkpoints/step-*")}


def kill_and_resume(folder, kills: int, n_steps: int, expected: dict[str, str], first_save: float, step: float) -> None:
    """Train with a save in every step, killed after the start or soon or later after a save, in turn: whatever is left is
    what the whole run had at that step. How long its first save and each step took says when, so that all kills come in time.
    """
    options = [*TRAIN, "-n", n_steps, "-s", 1, "--validate_every_n_steps", 0, "--keep", 2, "--resume", "auto"]
    source, share = random.Random(0), n_steps / kills * step
    for kill in range(kills):
        known = set((folder / "out").glob("*/checkpoints/step-*"))
        child = start(folder, TrainConfig, *options)
        while kill % 3 < 2 and set((folder / "out").glob("*/checkpoints/step-*")) <= known:
            time.sleep(0.001)
        time.sleep(source.random() * (min(0.1, share), share, first_save + share)[kill % 3])
        assert child.end(signal.SIGKILL).code == -signal.SIGKILL
        left = digests(folder)
        assert left and left.items() <= expected.items(), (kill, sorted(left))
        load_students(folder / "out" / "hyena.safetensors"), load_students(folder / "out" / "hyena.pt")
        print(f"kill {kill + 1}: {max(left)}", flush=True)
    done = ended(folder, TrainConfig, *options)
    assert done.code == 0 and digests(folder).items() <= expected.items(), done.err


@pytest.mark.gate
@pytest.mark.parametrize("kills, n_steps", [(3, 24), pytest.param(200, 800, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_goes_on_bit_equal_every_time(folder, tmp_path_factory, kills, n_steps):
    whole = writable_folder(tmp_path_factory.mktemp("whole"))
    (whole / "out").mkdir()
    (whole / "out" / "cache").symlink_to(folder / "out" / "cache")
    options = ["-n", n_steps, "-s", 1, "--keep", n_steps, "--validate_every_n_steps", 0]
    begun = time.time()
    assert ended(whole, TrainConfig, *TRAIN, *options).code == 0
    expected, saved = digests(whole), [path.stat().st_mtime for path in (whole / "out").glob("*/checkpoints/step-*")]
    assert len(set(expected.values())) == n_steps
    shutil.rmtree(whole)
    step = (max(saved) - min(saved)) / (n_steps - 1)
    kill_and_resume(folder, kills, n_steps, expected, first_save=min(saved) - begun, step=step)
