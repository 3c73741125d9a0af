"""Files that are not what was written, and files that claim more than they are."""

import os
import struct
import zipfile

import pytest
import torch

from sd_hyena.distil.resume import Resumable
from sd_hyena.errors import BadInput
from sd_hyena.files.weights import LARGEST_PT, read_weights, write_weights
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.swap import swapped
from tests.conftest import IN01
from tests.faults.conftest import TRAIN, ended

SHORT = [*TRAIN, "-n", 2, "-s", 1, "--validate_every_n_steps", 0]


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_the_newest_checkpoint_is_found_and_the_one_before_goes_on(folder):
    assert ended(folder, TrainConfig, *SHORT).code == 0
    _, newest = sorted((folder / "out").glob("*/checkpoints/*"))
    flip_a_bit(newest)
    named = ended(folder, TrainConfig, *SHORT, "--resume", newest)
    assert named.code == 2 and "step-00002.ckpt" in named.err and named.err.count("\n") == 1
    done = ended(folder, TrainConfig, *SHORT, "--resume", "auto")
    assert done.code == 0 and "passed over: resume=" in done.out


def test_a_flipped_bit_in_a_pt_is_found(tmp_path):
    path = tmp_path / "x.pt"
    write_weights(path, {"x": torch.ones(1000)}, {})
    read_weights(path)
    flip_a_bit(path)
    with pytest.raises(BadInput, match="not what was written"):
        read_weights(path)


def test_a_checkpoint_that_would_inflate_is_refused_before_it_does(tmp_path, monkeypatch):
    path = tmp_path / "run" / "checkpoints" / "step-00001.ckpt"
    path.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**7))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(BadInput, match="unpack to"):
        Resumable.find(TrainConfig(resume=str(path)))


def test_a_pt_that_claims_to_be_enormous_is_refused_before_it_is_read(tmp_path, monkeypatch):
    """The claim stands in the archive's directory; the file itself is small."""
    path = tmp_path / "x.pt"
    write_weights(path, {"x": torch.ones(3)}, {})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 20 : entry + 28] = struct.pack("<II", LARGEST_PT - 2, LARGEST_PT - 2)
    entry = content.index(b"PK\x01\x02", entry + 1)
    content[entry + 20 : entry + 28] = struct.pack("<II", LARGEST_PT - 2, LARGEST_PT - 2)
    path.write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(BadInput, match="unpack to"):
        read_weights(path)


def test_the_newest_checkpoint_is_the_one_of_most_steps_whatever_the_clock_said(folder):
    assert ended(folder, TrainConfig, *SHORT).code == 0
    for age, path in enumerate(sorted((folder / "out").glob("*/checkpoints/*"))):
        os.utime(path, (10**9 - age, 10**9 - age))
    found = Resumable.find(TrainConfig(resume="auto", out_dir=str(folder / "out")))
    assert found.path.name == "step-00002.ckpt" and found.step == 2


def test_a_unet_that_is_saved_while_students_are_in_it_is_the_unet_itself(own_pipe, tmp_path):
    unet, before = own_pipe.unet, {name: value.clone() for name, value in own_pipe.unet.state_dict().items()}
    with swapped(unet, {IN01: torch.nn.Linear(3, 3)}):
        unet.save_pretrained(tmp_path / "unet")
    again = type(unet).from_pretrained(tmp_path / "unet").state_dict()
    assert again.keys() == before.keys() and all(torch.equal(again[name], before[name]) for name in before)
