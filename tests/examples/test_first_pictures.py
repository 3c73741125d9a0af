"""What a first run draws, as typed but for the seed."""

import numpy as np
import pytest
from PIL import Image

from examples.tiny_sd.checker import is_right
from tests.conftest import ROOT, command


@pytest.mark.gate  # four pictures of the model's own size, half a minute on a free core
def test_the_first_four_pictures_show_their_prompt(tmp_path):
    done = command(ROOT / "generate.py", "-k", "0", "--device", "cpu", cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stderr
    line = "a red circle on white · 256x256 · 25 steps of ddim · guidance 3 · 4 pictures, seeds from 0 · float32 on cpu"
    assert line in done.stdout.splitlines()
    paths = [tmp_path / "outputs" / f"image_00{n}.png" for n in range(4)]
    assert sorted((tmp_path / "outputs").iterdir()) == paths
    assert sum(is_right(np.asarray(Image.open(path)), "a red circle on white") for path in paths) >= 3
