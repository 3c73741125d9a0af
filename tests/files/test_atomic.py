import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from sd_hyena.files.atomic import replacing
from tests.conftest import ROOT


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


WRITERS = {
    "safetensors": "from sd_hyena.files.weights import write_weights as w; w(path, {'x': torch.ones(n)}, {})",
    "pt": "from sd_hyena.files.weights import write_weights as w; w(path, {'x': torch.ones(n)}, {})",
    "ckpt": "from sd_hyena.distil.run_folder import AtomicCheckpointIO as A; A().save_checkpoint({'x': torch.ones(n)}, path)",
    "png": "import os; from PIL import Image; from sd_hyena.files.picture import write_image as w; "
    "w(Path(path), Image.frombytes('L', (1000, n // 250), os.urandom(n * 4)), '', {})",
}


def writer(path, n: int, suffix: str, before: str = "") -> list[str]:
    code = f"import torch\nfrom pathlib import Path\n{before}\npath, n = {str(path)!r}, {n}\n{WRITERS[suffix]}"
    return [sys.executable, "-c", code]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_full_disk_keeps_the_previous_file_and_leaves_no_litter(tmp_path, suffix):
    """RLIMIT_FSIZE makes the kernel refuse to write past 1 MB, as a full disk does."""
    path = tmp_path / f"a.{suffix}"
    subprocess.run(writer(path, 1000, suffix), cwd=ROOT, check=True)
    good = path.read_bytes()
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    failed = subprocess.run(writer(path, 10**6, suffix, limit), cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode != 0 and any(word in failed.stderr for word in ("File too large", "Error", "error"))
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_kill_in_the_middle_of_a_save_leaves_a_file_that_loads(tmp_path, suffix):
    """SIGKILL while a loop saves: whatever the moment, the newest file is whole."""
    import torch

    from sd_hyena.files.weights import read_weights

    path = tmp_path / f"a.{suffix}"
    loop = writer(path, 3 * 10**6, suffix)
    loop[-1] = loop[-1].replace("; w(", "\nwhile True: w(").replace("; A()", "\nwhile True: A()")
    for delay in (0.0, 0.01, 0.03, 0.07, 0.15):
        process = subprocess.Popen(loop, cwd=ROOT)
        while not path.exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        x = read_weights(path)[0]["x"] if suffix == "safetensors" else torch.load(path, weights_only=True)["x"]
        assert x.shape == (3 * 10**6,) and bool((x == 1).all())


def test_tmpdir_on_another_or_full_file_system_does_not_matter(tmp_path):
    path = tmp_path / "a.ckpt"
    environment = {**os.environ, "TMPDIR": "/proc/nowhere"}
    subprocess.run(writer(path, 1000, "ckpt"), cwd=ROOT, check=True, env=environment)
    assert path.exists()
