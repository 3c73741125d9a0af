"""A mask is not a picture, and what lies outside it stays the picture that it was."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from sd_hyena.errors import BadInput
from sd_hyena.files.mask import read_mask
from sd_hyena.files.picture import read_picture
from sd_hyena.generate.generation import generate
from sd_hyena.generate.task import Task
from sd_hyena.large.regions import Region
from sd_hyena.models.inpainting import SOFT, repainted
from sd_hyena.options.generate_config import GenerateConfig
from tests.gate import gated

SIDE = 64
PHOTO = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
DISC = np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5)) < 20
SOFT_DISC = (
    (255 * np.clip(1.5 - np.hypot(*(np.mgrid[:SIDE, :SIDE] - SIDE / 2 + 0.5)) / 20, 0, 1)).round().astype(np.uint8)
)
ANEW = (255 * DISC).astype(np.uint8)


def rgba(colour, alpha):
    pixels = np.broadcast_to(np.asarray(colour, np.uint8), (SIDE, SIDE, 3))
    return Image.fromarray(np.dstack([pixels, alpha]).astype(np.uint8))


def brushed(colour, under):
    """A brush of one colour on nothing, whose invisible pixels have another."""
    pixels = np.where(DISC[..., None], np.uint8(colour), np.uint8(under)).astype(np.uint8)
    return Image.fromarray(np.dstack([pixels, ANEW]))


MASKS = {  # -> what is white in it, and what is said
    "white on black": (Image.fromarray(ANEW), ANEW, ""),
    "a white brush on nothing": (brushed(255, 0), ANEW, "opacity"),
    "a white brush on invisible white": (brushed(255, 255), ANEW, "opacity"),
    "a black brush on nothing": (brushed(0, 0), ANEW, "opacity"),
    "a red brush on nothing": (rgba((200, 10, 10), ANEW), ANEW, "opacity"),
    "a soft brush on nothing": (rgba((255, 255, 255), SOFT_DISC), SOFT_DISC, "opacity"),
    "a grey brush with alpha, LA": (rgba((9, 9, 9), ANEW).convert("LA"), ANEW, "opacity"),
    "a picture with an erased part": (rgba(PHOTO, 255 - ANEW), ANEW, "transparency"),
    "a picture with a softly erased part": (rgba(PHOTO, 255 - SOFT_DISC), SOFT_DISC, "transparency"),
    "grey on black and on nothing": (rgba(ANEW[..., None].repeat(3, -1), np.tri(SIDE) * 255), ANEW * np.tri(SIDE), "grey"),
    "white on black, opaque": (Image.fromarray(ANEW).convert("RGBA"), ANEW, ""),
    "white on black, all of one opacity": (rgba(ANEW[..., None].repeat(3, -1), np.full((SIDE, SIDE), 9)), ANEW, ""),
    "a soft mask": (Image.fromarray(SOFT_DISC), SOFT_DISC, ""),
    "a palette": (Image.fromarray(ANEW).convert("P"), ANEW, ""),
    "one bit": (Image.fromarray(ANEW).convert("1"), ANEW, ""),
    "CMYK": (Image.fromarray(ANEW).convert("RGB").convert("CMYK"), ANEW, ""),
}  # fmt: skip


def saved(tmp_path, image, suffix=None):
    path = tmp_path / f"x{suffix or ('.tif' if image.mode in ('CMYK', 'F', 'I', 'LAB', 'YCbCr') else '.png')}"
    image.save(path)
    return path


@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_says_is_read_from_what_varies_in_it(tmp_path, name):
    image, expected, said = MASKS[name]
    mask, note = read_mask(saved(tmp_path, image))
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), expected.astype(np.uint8))
    assert (said in note and str(tmp_path) in note and "\n" not in note) if said else note == ""


def test_a_palette_with_a_transparent_colour_is_a_brush_too(tmp_path):
    palette = Image.fromarray(ANEW // 255).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save(tmp_path / "x.png", transparency=0)
    mask, note = read_mask(tmp_path / "x.png")
    assert np.array_equal(np.asarray(mask), ANEW) and "opacity" in note


LAB = ImageCms.profileToProfile(
    Image.fromarray(PHOTO), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)
GREY = PHOTO[..., 0]
RANGES = {  # a picture whose grey is GREY, in some range
    "16 bits": Image.fromarray(GREY.astype(np.uint16) * 257),
    "32 bits of 16": Image.fromarray(GREY.astype(np.int32) * 257),
    "32 bits of 8": Image.fromarray(GREY.astype(np.int32)),
    "32 bits": Image.fromarray((GREY / 255 * (2**31 - 1)).astype(np.int32)),
    "floats to 1": Image.fromarray((GREY / 255).astype(np.float32)),
    "floats a little over 1": Image.fromarray((GREY / 255 * 1.0005).astype(np.float32)),
    "floats to 255": Image.fromarray(GREY.astype(np.float32)),
    "floats to 65535": Image.fromarray(GREY.astype(np.float32) * 257),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_mode_is_read_by_its_range(tmp_path, name):
    image = RANGES[name]
    path = saved(tmp_path, image, ".png" if image.mode == "I;16" else ".tif")
    assert np.array_equal(np.asarray(read_picture(path))[..., 0], GREY)
    assert np.array_equal(np.asarray(read_mask(path)[0]), GREY)


def test_dark_16_bits_stay_dark_and_big_endian_ones_are_read(tmp_path):
    Image.fromarray(np.full((SIDE, SIDE), 200, np.uint16)).save(tmp_path / "dark.png")
    assert np.asarray(read_picture(tmp_path / "dark.png")).max() == 1
    big = (GREY.astype(">u2") * 257).astype(">u2").tobytes()
    Image.frombytes("I;16B", (SIDE, SIDE), big).save(tmp_path / "big.tif")
    assert np.array_equal(np.asarray(read_picture(tmp_path / "big.tif"))[..., 0], GREY)


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "RGBX", "RGBa", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pillow_is_a_picture(tmp_path, monkeypatch, mode):
    """Some have no file format that keeps them, so the file is what Pillow would have opened."""
    image = LAB if mode == "LAB" else Image.fromarray(PHOTO)
    for step in {"RGBa": ("RGBA", "RGBa"), "PA": ("P", "PA")}.get(mode, (mode,)):
        image = image if mode == "LAB" else image.convert(step)
    expected = (
        PHOTO if mode == "LAB" else image.convert("RGBA" if mode in ("RGBa", "PA", "LA") else "RGB").convert("RGB")
    )
    monkeypatch.setattr(Image, "open", lambda _: image.copy())
    difference = np.asarray(read_picture("x")).astype(int) - np.asarray(expected)
    assert abs(difference).mean() < 2 if mode == "LAB" else not difference.any()


@pytest.mark.parametrize("pixels", [np.float32("nan"), np.float32("inf"), np.float32(1e12)])
def test_floats_of_no_range_are_refused(tmp_path, pixels):
    Image.fromarray(np.full((8, 8), pixels)).save(tmp_path / "x.tif")
    for read in (read_picture, read_mask):
        with pytest.raises(BadInput, match=r"x\.tif' is no readable image \(its? ") as error:
            read(tmp_path / "x.tif")
        assert "\n" not in str(error.value)


def config(tmp_path, **options):
    base = dict(width=SIDE, steps=4, num_images=1, seed=1, prompt="a red circle", device="cpu", out_dir=str(tmp_path))
    return GenerateConfig(**base | options)


def painted(tmp_path, mask, **options):
    """The old picture and the new one."""
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    given = dict(init_image=str(tmp_path / "photo.png"), mask=str(saved(tmp_path, mask)), strength=0.8)
    (path,) = generate(config(tmp_path, **given | options))
    return PHOTO.astype(int), np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize(
    "name", ["a white brush on nothing", *gated(["white on black", "a picture with an erased part"])]
)
def test_outside_the_mask_the_picture_is_the_old_one_bit_for_bit(tmp_path, loaded_once, capsys, name):
    old, new = painted(tmp_path, MASKS[name][0])
    assert np.array_equal(old[~DISC], new[~DISC])
    assert abs(old[DISC] - new[DISC]).mean() > 20
    assert (MASKS[name][2] in "".join(capsys.readouterr())) if MASKS[name][2] else True


def test_so_it_is_in_tiles_and_with_a_soft_mask_cut_at_one_half(tmp_path, loaded_once):
    tiles = dict(tiled_diffusion="mixture", tile_width=8, tile_height=8, tiled_vae="exact")
    old, new = painted(tmp_path, MASKS["a soft mask"][0], **tiles)
    white = SOFT_DISC >= 128
    assert np.array_equal(old[~white], new[~white]) and not np.array_equal(old[white], new[white])


def test_the_old_picture_becomes_the_new_one_over_a_soft_edge_inside_the_mask():
    wide = np.zeros((9, 40), np.uint8)
    wide[:, 10:30] = 255
    old, new = Image.new("RGB", (40, 9), (100, 100, 100)), np.full((9, 40, 3), 200, np.uint8)
    row = repainted(old, new, Image.fromarray(wide))[4, :, 0].astype(int)
    ramp = [100 + round(100 * i / SOFT) for i in range(1, SOFT)]
    assert row.tolist() == [100] * 10 + ramp + [200] * (20 - 2 * len(ramp)) + ramp[::-1] + [100] * 10
    assert np.array_equal(repainted(old, new, Image.new("L", (40, 9), 255)), new)  # no border, no edge


def test_a_mask_that_is_white_nowhere_is_refused(tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    for brightest in (0, 1, 127):
        Image.new("L", (SIDE, SIDE), brightest).save(tmp_path / "mask.png")
        with pytest.raises(BadInput, match=rf"nowhere white \(its brightest pixel is {brightest} of 255\)"):
            given = dict(init_image=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"))
            Task.of(config(tmp_path, **given).filled())


@pytest.mark.parametrize(
    "name", ["a soft brush on nothing", *gated(["a soft mask", "a picture with a softly erased part"])]
)
def test_masks_of_regions_stay_soft_and_say_how_they_are_read(tmp_path, name, loaded_once, capsys):
    image, expected, said = MASKS[name]
    path = saved(tmp_path, image)
    opacity = Region(x=0, y=0, w=1, h=1, mask=str(path)).opacity((SIDE, SIDE))
    assert torch.equal(opacity, torch.from_numpy(expected / np.float32(255)))
    region = dict(x=0, y=0, w=1, h=1, prompt="blue", mask=str(path))
    (tmp_path / "r.json").write_text(json.dumps({"bbox_controls": [region]}))
    generate(config(tmp_path, steps=1, regions=str(tmp_path / "r.json")))
    out = "".join(capsys.readouterr())
    assert out.count("note: the mask") == bool(said) and said in out
