import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata, read_picture, write_image
from sd_hyena.files.picture_text import read_texts
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import parameters


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_prompt_survives_the_file(tmp_path_factory, prompt):
    path = tmp_path_factory.mktemp("png") / "x.png"
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    options = to_dict(GenerateConfig(prompt="x", seed=1).filled()) | {
        "prompt": prompt
    }  # wildcards, too: no config has them
    text = parameters(options, "m", "0" * 64)
    write_image(path, image, text, {"config": {"prompt": prompt}})
    assert read_metadata(path) == {"config": {"prompt": prompt}}
    with Image.open(path) as read:
        assert np.array_equal(np.array(read), np.array(image))
        assert read.info["parameters"] == text.replace("\0", "")


def test_an_image_of_somebody_else_has_no_metadata(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    assert read_metadata(tmp_path / "x.png") == {} and read_texts(tmp_path / "x.png") == {}


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
        for read in (read_metadata, read_texts):
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


PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("CMYK", "tif"), ("P", "png"), ("L", "png"), ("1", "png")])
def test_a_picture_of_any_mode_is_read_as_rgb(tmp_path, mode, suffix):
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / f"x.{suffix}")
    assert np.array_equal(np.array(read_picture(tmp_path / f"x.{suffix}")), np.array(image.convert("RGB")))


def test_sixteen_bits_are_scaled_transparency_is_white_and_a_turned_picture_is_upright(tmp_path):
    grey = PIXELS[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(np.array(read_picture(tmp_path / "deep.png")), grey[..., None].repeat(3, -1))
    half = np.concatenate([PIXELS, np.where(np.arange(7) < 4, 255, 0).repeat(5).reshape(7, 5).T[..., None]], -1)
    Image.fromarray(half.astype(np.uint8), "RGBA").save(tmp_path / "alpha.png")
    read = np.array(read_picture(tmp_path / "alpha.png"))
    assert np.array_equal(read[:, :4], PIXELS[:, :4]) and (read[:, 4:] == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(np.array(read_picture(tmp_path / "turned.png")), np.rot90(PIXELS, -1))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.array(read_picture(tmp_path / "x.gif"))[0, 0].tolist() == [255, 0, 0]


def bomb() -> bytes:
    """A PNG whose header claims 20 000 x 20 000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def png() -> bytes:
    Image.fromarray(PIXELS.repeat(40, 0).repeat(40, 1)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no image", png()[:500], png()[:-30].replace(b"IDAT", b"IDAX"), bomb()],
    ids=["empty", "text", "truncated", "without data", "bomb"],
)  # fmt: skip
def test_what_is_no_readable_picture_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.png' is no readable image") as error:
        read_picture(tmp_path / "x.png")
    assert "\n" not in str(error.value)
