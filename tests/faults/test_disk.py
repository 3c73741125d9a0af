"""Disks that fill up, folders that cannot be written to, temporary files on another file system."""

import os
import resource

import pytest
from PIL import Image

from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.checkpoint import load_students
from tests.faults.conftest import GENERATE, TRAIN, ended, litter, without_root


def no_file_beyond(size: int):
    """The kernel refuses to write past so many bytes, as a full disk does."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_disk_that_fills_up_stops_the_training_and_what_was_saved_goes_on(folder):
    short = [*TRAIN, "--validate_every_n_steps", 0]
    assert ended(folder, TrainConfig, *short, "-n", 2).code == 0
    (saved,) = (folder / "out").glob("*/checkpoints/*.ckpt")
    good, student = saved.read_bytes(), (folder / "out" / "hyena.pt").read_bytes()
    for limit in (len(good) - 1, len(student) - 1):  # the checkpoint does not fit; nor does the student
        full = ended(folder, TrainConfig, *short, "-n", 4, "--resume", "auto", fault=no_file_beyond(limit))
        assert full.code == 1 and full.last_line.startswith("error: "), full.err
        assert list((folder / "out").glob("*/checkpoints/*")) == [saved] and saved.read_bytes() == good
        load_students(folder / "out" / "hyena.pt")
        assert litter(folder) == []
    done = ended(folder, TrainConfig, *short, "-n", 4, "--resume", "auto")
    assert done.code == 0 and load_students(folder / "out" / "hyena.pt").training["step"] == 4


@pytest.mark.gate
def test_curves_that_fill_the_disk_stop_the_run_and_its_last_checkpoint_goes_on(folder, previews_drawn):
    """Pictures in every step make TensorBoard's file outgrow a limit that a checkpoint keeps."""
    options = [*TRAIN, "--operator_options", "landmarks=4", "-n", 60, "-s", 2, "--validate_every_n_steps", 1]
    full = ended(folder, TrainConfig, *options, fault=no_file_beyond(165_000))
    assert full.code == 1 and full.err.count("error: ") == 1 and "File too large" in full.last_line
    (events,) = [path for path in folder.glob("logs/*/events*") if path.stat().st_size > 150_000]
    (newest, *_) = sorted((folder / "out").glob("*/checkpoints/*"), reverse=True)
    step = int(newest.stem.removeprefix("step-"))
    done = ended(folder, TrainConfig, *options[:-2], "--validate_every_n_steps", 0, "-n", step + 2, "--resume", "auto")
    assert (
        done.code == 0 and load_students(folder / "out" / "hyena.pt").training["step"] == step + 2 and events.exists()
    )


def test_a_disk_that_fills_up_stops_the_drawing_with_one_line_and_keeps_the_pictures(tmp_path):
    assert ended(tmp_path, GenerateConfig, *GENERATE, "-n", 1).code == 0
    (picture,) = (tmp_path / "out").iterdir()
    good = picture.read_bytes()
    full = ended(tmp_path, GenerateConfig, *GENERATE, fault=no_file_beyond(1000))
    assert full.code == 1 and full.last_line.startswith("error: OSError: ") and "File too large" in full.last_line
    assert list((tmp_path / "out").iterdir()) == [picture] and picture.read_bytes() == good


@pytest.mark.parametrize("config_class, options", [(TrainConfig, TRAIN), (GenerateConfig, GENERATE)])
def test_a_read_only_folder_is_refused_in_one_line(tmp_path, config_class, options):
    tmp_path.chmod(0o777)
    (tmp_path / "out").mkdir(mode=0o555)
    refused = ended(tmp_path, config_class, *options, fault=without_root)
    assert refused.code == 2 and refused.err == (
        "error: out_dir='out' cannot be written to (Permission denied); name a folder you own\n"
    )


@pytest.mark.gate
@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no second file system")
def test_temporary_files_on_another_file_system_do_not_matter(folder, monkeypatch):
    """A rename from there would fail; and nothing is put there."""
    import tempfile

    if os.stat("/dev/shm").st_dev == os.stat(folder).st_dev:
        pytest.skip("/dev/shm is the same file system")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:

        def fault():
            os.environ["TMPDIR"] = tempfile.tempdir = elsewhere

        assert ended(folder, TrainConfig, *TRAIN, "-n", 2, fault=fault).code == 0
        assert ended(folder, GenerateConfig, *GENERATE, "-y", "out/hyena.pt", fault=fault).code == 0
        assert os.listdir(elsewhere) == []
    with Image.open(folder / "out" / "image_000.png") as picture:
        assert picture.size == (64, 64)
