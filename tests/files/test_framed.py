import numpy as np
import pytest
from PIL import Image

from sd_hyena.files.framed import framed, same_shape

PIXELS = np.random.default_rng(0).integers(0, 255, (20, 40, 3), dtype=np.uint8)
WIDE = Image.fromarray(PIXELS)


def test_a_crop_is_the_middle():
    assert np.array_equal(np.asarray(framed(WIDE, (20, 20), "crop")), PIXELS[:, 10:30])
    tall = np.asarray(framed(Image.fromarray(PIXELS.transpose(1, 0, 2)), (20, 10), "crop"))
    assert np.array_equal(tall, PIXELS.transpose(1, 0, 2)[15:25])


def test_a_fit_holds_all_and_draws_its_edges_out_or_fills_the_rest():
    found = np.asarray(framed(WIDE, (40, 33), "fit"))
    assert np.array_equal(found[6:26], PIXELS) and found.shape == (33, 40, 3)  # 13 rows are missing: 6 and 7
    assert (found[:6] == PIXELS[0]).all() and (found[26:] == PIXELS[-1]).all()
    mask = np.asarray(framed(Image.fromarray(PIXELS[..., 0]), (40, 33), "fit", rest=255))
    assert np.array_equal(mask[6:26], PIXELS[..., 0]) and (mask[:6] == 255).all() and (mask[26:] == 255).all()


@pytest.mark.parametrize("resize", ["crop", "fit", "stretch"])
def test_one_shape_is_resampled_as_ever(resize):
    """121x81 is 3:2 but for a pixel, which is no other shape."""
    odd = Image.fromarray(np.random.default_rng(1).integers(0, 255, (81, 121), dtype=np.uint8))
    for image, size in ((WIDE, (80, 40)), (odd, (120, 80)), (WIDE, (40, 20))):
        expected = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
        assert same_shape(image.size, size) and np.array_equal(np.asarray(framed(image, size, resize)), expected)
    stretched = framed(WIDE, (16, 64), "stretch")
    assert np.array_equal(np.asarray(stretched), np.asarray(WIDE.resize((16, 64), Image.Resampling.LANCZOS)))
