import os
import resource
import signal
import stat
import tempfile
import time

import pytest
import torch
from PIL import Image

from sd_hyena.distil.run_folder import AtomicCheckpointIO
from sd_hyena.files.atomic import replacing
from sd_hyena.files.picture import write_image
from sd_hyena.files.weights import read_weights, write_weights
from tests.fork import fork


def test_the_new_file_takes_the_place_of_the_old_with_the_umasks_mode_and_no_litter(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with replacing(path) as temporary:
        assert temporary.parent == tmp_path and path.read_bytes() == b"old"
        temporary.write_bytes(b"new")
    umask = os.umask(0)
    os.umask(umask)
    assert path.read_bytes() == b"new" and stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def noise(n: int) -> Image.Image:
    return Image.frombytes("L", (1000, n // 250), os.urandom(n * 4))


WRITERS = {
    "safetensors": lambda path, n: write_weights(path, {"x": torch.ones(n)}, {}),
    "pt": lambda path, n: write_weights(path, {"x": torch.ones(n)}, {}),
    "ckpt": lambda path, n: AtomicCheckpointIO().save_checkpoint({"x": torch.ones(n)}, path),
    "png": lambda path, n: write_image(path, noise(n), "", {}),
}


@pytest.fixture
def writing(tmp_path_factory):
    """Write so many numbers in a process of its own, to which something may happen before; not waited for."""

    def write(path, n: int, before=lambda: None, forever=False):
        def body() -> int:
            before()
            WRITERS[path.suffix[1:]](path, n)
            while forever:
                WRITERS[path.suffix[1:]](path, n)
            return 0

        return fork(body, tmp_path_factory.mktemp("said"))

    return write


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_keeps_the_previous_file_and_leaves_no_litter(tmp_path, writing, suffix):
    """RLIMIT_FSIZE makes the kernel refuse to write past 1 MB, as a full disk does."""

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    path = tmp_path / f"a.{suffix}"
    assert writing(path, 1000).end().code == 0
    good = path.read_bytes()
    failed = writing(path, 10**6, full).end()
    assert failed.code != 0 and any(word in failed.err for word in ("File too large", "Error", "error"))
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_kill_in_the_middle_of_a_save_leaves_a_file_that_loads(tmp_path, writing, suffix):
    """SIGKILL while a loop saves: whatever the moment, the newest file is whole."""
    path = tmp_path / f"a.{suffix}"
    for delay in (0.0, 0.01, 0.03, 0.07, 0.15):
        path.unlink(missing_ok=True)
        child = writing(path, 3 * 10**6, forever=True)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        assert child.end(signal.SIGKILL).code == -signal.SIGKILL
        x = read_weights(path)[0]["x"] if suffix == "safetensors" else torch.load(path, weights_only=True)["x"]
        assert x.shape == (3 * 10**6,) and bool((x == 1).all())


def test_tmpdir_on_another_or_full_file_system_does_not_matter(tmp_path, writing):
    def elsewhere():
        os.environ["TMPDIR"], tempfile.tempdir = "/proc/nowhere", None

    path = tmp_path / "a.ckpt"
    done = writing(path, 1000, elsewhere).end()
    assert done.code == 0 and path.exists(), done.err
