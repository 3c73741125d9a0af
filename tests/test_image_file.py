import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.config import GenerateConfig, to_dict
from sd_hyena.errors import BadInput
from sd_hyena.image_file import read_metadata, read_parameters, write_image
from sd_hyena.infotext import parameters


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_prompt_survives_the_file(tmp_path_factory, prompt):
    path = tmp_path_factory.mktemp("png") / "x.png"
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    text = parameters(to_dict(GenerateConfig(prompt=prompt, seed=1)), "m", "0" * 64)
    write_image(path, image, text, {"config": {"prompt": prompt}})
    assert read_metadata(path) == {"config": {"prompt": prompt}}
    with Image.open(path) as read:
        assert np.array_equal(np.array(read), np.array(image))
        assert read.info["parameters"] == text.replace("\0", "")


def test_an_image_of_somebody_else_has_no_metadata(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert read_metadata(tmp_path / "x.png") == {} and read_parameters(tmp_path / "x.png") == ""


@pytest.mark.parametrize("chunk", ["{", "[1]", "null", "3", "[" * 10**5])
def test_damaged_metadata_is_refused(tmp_path, chunk):
    info = PngInfo()
    info.add_itxt("sd_hyena", chunk)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(BadInput, match="damaged"):
        read_metadata(tmp_path / "x.png")


def test_a_text_bomb_a_text_file_and_a_missing_file_are_refused(tmp_path):
    info = PngInfo()
    info.add_text("sd_hyena", "x" * (1 << 24), zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "bomb.png", pnginfo=info)
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((tmp_path / "bomb.png").read_bytes()[:40])
    for name in ("bomb.png", "text.png", "missing.png"):
        for read in (read_metadata, read_parameters):
            with pytest.raises(BadInput):
                read(tmp_path / name)


def test_an_enormous_canvas_is_not_decoded_to_read_its_text(tmp_path):
    """A header of 60000 x 60000 pixels without the pixels: our own 16384² images are beyond Pillow's limit too."""
    info = PngInfo()
    info.add_itxt("sd_hyena", '{"config": {}}')
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=info)
    data = bytearray((tmp_path / "x.png").read_bytes())
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "x.png").write_bytes(data)
    assert read_metadata(tmp_path / "x.png") == {"config": {}}
