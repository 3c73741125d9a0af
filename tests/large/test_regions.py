import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import write_image
from sd_hyena.large.regions import Region, Texts, from_dict, read_regions, to_dict, with_noise, write_regions

SEED_FILE = {
    "bbox_controls": [
        {
            "enable": True,
            "x": 0,
            "y": 0,
            "w": 0.15,
            "h": 1,
            "prompt": "a red circle on blue",
            "neg_prompt": "stripes",
            "blend_mode": "Foreground",
            "feather_ratio": 0.05,
            "seed": 421369420711,
        },
        {
            "enable": False,
            "x": 0.4,
            "y": 0.4,
            "w": 0.2,
            "h": 0.2,
            "prompt": "",
            "neg_prompt": "",
            "blend_mode": "Background",
            "feather_ratio": 0.2,
            "seed": -1,
        },
    ]
}
FULL = Region(x=0.25, y=0, w=0.5, h=1, prompt="ein Kreis: ○", guidance_scale=3.5, adapters=(), mask="m.png", seed=7)


def test_a_file_of_tiled_diffusion_is_read_and_written_as_it_was(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(SEED_FILE))
    first, second = regions = read_regions(tmp_path / "r.json")
    assert first == Region(
        x=0,
        y=0,
        w=0.15,
        h=1,
        prompt="a red circle on blue",
        negative_prompt="stripes",
        blend_mode="foreground",
        feather_ratio=0.05,
        seed=421369420711,
    )
    assert not second.enable and second.seed is None and second.blend_mode == "background"
    write_regions(tmp_path / "s.json", regions)
    assert json.loads((tmp_path / "s.json").read_text()) == SEED_FILE


@pytest.mark.parametrize("regions", [(), (FULL,), (FULL, Region(x=0, y=0.5, w=1, h=0.5, adapters=("a", "b")))])
def test_regions_survive_a_file_and_a_png(tmp_path, regions):
    write_regions(tmp_path / "r.json", regions)
    write_image(tmp_path / "r.png", Image.new("RGB", (8, 8)), "", {"regions": to_dict(regions)})
    assert read_regions(tmp_path / "r.json") == read_regions(tmp_path / "r.png") == regions


ONE = {"x": 0, "y": 0, "w": 0.5, "h": 0.5}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": float("nan")}, "w=nan .*number"),
        ({"w": "0.5"}, "w='0.5' .*number"),
        ({"w": True}, "w=True .*number"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"blend_mode": "Multiply"}, "blend_mode='multiply' .*background or foreground"),
        ({"blend_mode": 3}, "blend_mode=3"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": -2}, "seed=-2"),
        ({"adapters": "style"}, "adapters='style' .*list"),
        ({"adapters": [1]}, "adapters="),
        ({"adapters": True}, "adapters=True"),
        ({"prompt": "\ud800"}, "no Unicode text"),
        ({"prompt": 5}, "prompt=5 .*no text"),
        ({"prompt": "[a:b:.5]"}, "changes the prompt while"),
        ({"prompt": "a <lora:fur:1>"}, "asks for the LoRA 'fur'; name it under \"adapters\""),
    ],
)
def test_a_region_that_cannot_work_is_one_line_with_its_number(change, message):
    with pytest.raises(BadInput, match=message) as error:
        from_dict({"bbox_controls": [ONE, ONE | change]}, "r.json")
    assert str(error.value).startswith("r.json, region 2: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        (b"{", "no valid JSON"),
        (b"\xff\xfe", "no valid JSON"),
        (b"[" * 100000, "no valid JSON"),
        (b"[]", "no list bbox_controls"),
        (b'{"bbox_controls": {}}', "no list bbox_controls"),
        (b'{"bbox_controls": [1]}', "region 1: 1 is no mapping"),
        (b'{"bbox_controls": []}' + b" " * (1 << 20), "larger than"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, text, message):
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(BadInput, match=message) as error:
        read_regions(tmp_path / "r.json")
    assert "r.json" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_a_picture_without_regions_are_one_line(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        read_regions(tmp_path / "r.json")
    write_image(tmp_path / "r.png", Image.new("RGB", (8, 8)), "", {})
    with pytest.raises(BadInput, match="holds no regions"):
        read_regions(tmp_path / "r.png")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_regions(tmp_path / "r.json", (FULL,))
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        write_regions(tmp_path / "r.json", ())
    assert read_regions(tmp_path / "r.json") == (FULL,) and len(list(tmp_path.iterdir())) == 1


def noise_of(seed, h, w):
    return torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(seed))


def test_seeded_regions_bring_their_own_noise_and_leave_the_rest_and_the_global_state_alone():
    python, torch_state = random.getstate(), torch.get_rng_state()
    canvas = noise_of(0, 20, 30).repeat(2, 1, 1, 1)
    left = Region(x=0, y=0, w=0.5, h=1, seed=1)
    middle = Region(x=0.3, y=0, w=0.4, h=0.5, seed=2)
    front = Region(x=0.1, y=0.75, w=0.2, h=0.25, seed=3, blend_mode="foreground")
    unseeded = Region(x=0, y=0, w=1, h=1)
    noise = with_noise(canvas, [front, left, unseeded, middle])
    one, two, three = noise_of(1, 20, 15), noise_of(2, 10, 12), noise_of(3, 5, 6)
    assert torch.equal(noise[..., :15, :9], one[..., :15, :9].expand(2, -1, -1, -1))
    torch.testing.assert_close(noise[:1, :, :10, 9:15], (one[..., :10, 9:] + two[..., :6]) / 2**0.5)
    assert torch.equal(noise[:1, :, :10, 15:21], two[..., 6:])
    assert torch.equal(noise[1:, :, 15:, 3:9], three)
    assert torch.equal(noise[..., 10:, 15:], canvas[..., 10:, 15:])
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), torch_state)


def test_noise_keeps_unit_variance_where_regions_overlap_and_follows_the_scheduler_s_scale():
    regions = [Region(x=0, y=0, w=1, h=1, seed=seed) for seed in range(3)]
    noise = with_noise(torch.zeros(1, 4, 100, 100), regions)
    assert noise.var().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(with_noise(torch.zeros(1, 4, 100, 100), regions, 14.6), 14.6 * noise)
    assert with_noise(torch.zeros(1, 4, 8, 8, dtype=torch.float16), regions).dtype == torch.float16


def test_a_mask_is_laid_over_the_rectangle_and_multiplies_the_feather(tmp_path):
    mask = Image.new("L", (40, 20), 0)
    mask.paste(255, (20, 0, 40, 20))
    mask.save(tmp_path / "m.png")
    plain = Region(x=0, y=0, w=0.5, h=0.5, mask=str(tmp_path / "m.png"))
    opacity = plain.opacity((20, 40))
    assert opacity.shape == (10, 20) and not opacity[:, :10].any() and (opacity[:, 10:] == 1).all()
    front = Region(x=0.25, y=0.25, w=0.5, h=0.5, mask=plain.mask, blend_mode="foreground", feather_ratio=1)
    bare = Region(x=0.25, y=0.25, w=0.5, h=0.5, blend_mode="foreground", feather_ratio=1)
    torch.testing.assert_close(front.opacity((20, 40)), bare.opacity((20, 40)) * opacity)


def test_a_mask_is_read_as_any_picture_is_upright_and_in_sixteen_bits(tmp_path):
    deep = np.zeros((20, 40), np.uint16)
    deep[:, 20:] = 300 * 128  # more than 255 in a byte's place: cut off it would be white
    Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = Image.new("L", (20, 40), 0)
    turned.paste(255, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    deep, turned = (Region(x=0, y=0, w=1, h=1, mask=str(tmp_path / f"{n}.png")) for n in ("deep", "turned"))
    found = deep.opacity((20, 40))
    assert not found[:, :20].any() and (found[:, 20:] == 300 * 128 // 257 / 255).all()
    found = turned.opacity((20, 40))
    assert not found[:, :20].any() and (found[:, 20:] == 1).all()


def test_a_mask_that_is_missing_damaged_or_a_bomb_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("missing.png", "damaged.png", "bomb.png"):
        region = Region(x=0, y=0, w=1, h=1, mask=str(tmp_path / name))
        with pytest.raises(BadInput, match=f"mask of a region: .*{name}' is no readable image") as error:
            region.opacity((8, 8))
        assert "\n" not in str(error.value)


RED = Region(x=0, y=0, w=0.5, h=1, prompt="a red circle", negative_prompt="green")
MUTE = Region(x=0.5, y=0, w=0.5, h=1)


def encoded(pipe, prompt, negative, images=1, guidance=True):
    return pipe.encode_prompt(prompt, torch.device("cpu"), images, guidance, negative)


@pytest.mark.parametrize(
    "prompt, negative, red, red_negative",
    [
        ("on blue", "stripes", "on blue, a red circle", "stripes, green"),
        ("", None, "a red circle", "green"),
        (["on blue", "on white"], None, ["on blue, a red circle", "on white, a red circle"], ["green", "green"]),
        (["on blue", ""], ["a", "b"], ["on blue, a red circle", "a red circle"], ["a, green", "b, green"]),
    ],
)
def test_a_region_s_prompts_are_appended_to_the_picture_s(pipe, prompt, negative, red, red_negative):
    texts = Texts(pipe.encode_prompt, (RED, MUTE))
    positive, negatives = texts.encode_prompt(prompt, torch.device("cpu"), 2, True, negative_prompt=negative)
    plain = encoded(pipe, prompt, negative, 2)
    assert torch.equal(positive, plain[0]) and torch.equal(negatives, plain[1])
    batch = {"encoder_hidden_states": torch.cat([negatives, positive]), "timestep": 3}
    expected = encoded(pipe, red, red_negative, 2)
    found = texts.of(RED, batch)
    assert torch.equal(found["encoder_hidden_states"], torch.cat([expected[1], expected[0]])) and found["timestep"] == 3
    assert torch.equal(texts.of(MUTE, batch)["encoder_hidden_states"], batch["encoder_hidden_states"])
    assert torch.equal(batch["encoder_hidden_states"], torch.cat([negatives, positive]))


def test_the_order_of_the_batch_is_found_whatever_the_pipeline(pipe):
    texts = Texts(pipe.encode_prompt, (RED,))
    p, n = texts.encode_prompt(["on blue", "on white"], torch.device("cpu"), 1, True, negative_prompt=["", "stripes"])
    for order in ([n, p], [p], [n], [n, p, p], [p, n, n]):
        roles = [0 if part is p else 1 for part in order]
        assert texts.roles(torch.cat(order)) == roles
    with pytest.raises(BadInput, match="changed while"):
        texts.roles(torch.cat([n, 2 * p]))


def test_an_empty_prompt_that_equals_the_negative_one_keeps_its_place(pipe):
    texts = Texts(pipe.encode_prompt, (RED,))
    p, n = texts.encode_prompt("", torch.device("cpu"), 1, True)
    assert torch.equal(p, n) and texts.roles(torch.cat([n, p])) == [1, 0]


def test_where_the_picture_is_given_as_embeddings_a_region_has_its_own_prompt_alone(pipe):
    p, n = encoded(pipe, ["on blue", "on white"], ["stripes", ""])
    texts = Texts(pipe.encode_prompt, (RED,))
    device = torch.device("cpu")
    texts.encode_prompt(None, device, 1, True, prompt_embeds=p, negative_prompt_embeds=n)
    expected = encoded(pipe, ["a red circle"] * 2, ["green"] * 2)
    found = texts.of(RED, {"encoder_hidden_states": torch.cat([n, p])})["encoder_hidden_states"]
    assert torch.equal(found, torch.cat([expected[1], expected[0]]))


def test_without_the_pipeline_s_own_prompt_there_is_one_clear_line(pipe):
    with pytest.raises(BadInput, match="own prompt"):
        Texts(pipe.encode_prompt, (RED,)).roles(torch.zeros(2, 32, 96))
