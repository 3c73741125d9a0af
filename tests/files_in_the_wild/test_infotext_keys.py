"""A1111's parameters: each key is used, named, or one that changes no pixel; and the forms in which they come."""

import json
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.hashes import file_sha256, lora_sha256
from sd_hyena.large.regions import read_regions
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import UsedLora, options, parameters
from sd_hyena.options.infotext_keys import HARMLESS

PLAIN = "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU"

KEYS_THAT_CHANGE_PIXELS = {  # of A1111, Forge, SD.Next and extensions, as their pictures have them
    "Steps": "21", "Sampler": "Heun", "Schedule type": "Karras", "CFG scale": "4.5", "Seed": "6", "Size": "72x64",
    "Clip skip": "2", "Model": "any-v4", "VAE": "vae-ft-mse.safetensors", "Denoising strength": "0.55",
    "Hires upscale": "2", "Hires steps": "10", "Hires upscaler": "Latent", "Hires resize": "1024x1024",
    "Hires sampler": "Euler a", "Hires checkpoint": "other", "Hires CFG Scale": "5", "Hires prompt": '"a, b"',
    "Hires negative prompt": "c", "First pass size": "512x512", "Variation seed": "77", "Variation seed strength": "0.2",
    "Seed resize from": "512x512", "Face restoration": "CodeFormer", "Tiling": "True", "ENSD": "31337", "Eta": "0.5",
    "RNG": "NV", "Refiner": "sdxl_refiner [7440042bbd]", "Refiner switch at": "0.8", "Lora hashes": '"fur: aabbccddeeff"',
    "TI hashes": '"easynegative: c74b4e810b03"', "Hypernet": "anime_2", "Hypernet strength": "0.8",
    "Conditional mask weight": "0.5", "Mask blur": "4", "Inpaint area": "Only masked", "Masked area padding": "32",
    "Masked content": "original", "Initial noise multiplier": "0.8", "Extra noise": "0.1", "Token merging ratio": "0.5",
    "Token merging ratio hr": "0.5", "NGMS": "2", "Sigma churn": "0.3", "Schedule max sigma": "14.6", "Schedule rho": "7",
    "SGM noise multiplier": "True", "Noise Schedule": "Zero Terminal SNR", "Downcast alphas_cumprod": "True",
    "Skip Early CFG": "0.2", "UniPC variant": "bh2", "Discard penultimate sigma": "True", "Emphasis": "No norm",
    "Pad conds": "True", "Old prompt editing timelines": "True", "VAE Encoder": "TAESD", "VAE Decoder": "TAESD",
    "ControlNet 0": '"Module: canny, Model: control_canny, Weight: 1.0"', "ControlNet": '"preprocessor: depth, weight: 1"',
    "ADetailer model": "face_yolov8n.pt", "ADetailer prompt": '"a\\nb"', "FreeU Stages": '"[{}]"', "FreeU Schedule": "0",
    "Style Selector Enabled": "True", "Style Selector Style": "Anime", "Dynamic thresholding enabled": "True",
    "Mimic scale": "7", "Regional Prompter": "x", "RP Active": "True", "Hypertile U-Net": "True", "AddNet Enabled": "True",
    "Tiled Diffusion": "\"{'Method': 'MultiDiffusion', 'Tile tile width': 16}\"", "Tiled Diffusion upscaler": "4x",
    "multidiffusion_enabled": "True", "Cutoff enabled": "True", "CFG Rescale φ": "0.7", "Distilled CFG Scale": "3.5",
    "Perturbed Attention Guidance": "3", "kohya_hrfix_enabled": "True", "IPAdapter": "x", "Soft inpainting enabled": "True",
    "Styles": "cinematic", "Postprocess upscale by": "2", "Module 1": "ae", "Image CFG scale": "1.5",
}  # fmt: skip
KEYS_THAT_CHANGE_NONE = {
    "Version": "v1.10.1", "User": "x", "Time taken": "3.1 sec.", "Batch size": "4", "Batch pos": "2", "Hyena": "IN01:h",
    "Created Date": "2024-01-01T00:00:00Z", "Model hash": "93b79e09ed", "VAE hash": "735e4c3a44",
    "Hashes": '{"model": "93b79e09ed", "vae": "735e4c3a44"}',
    "Civitai resources": '[{"type":"checkpoint","modelVersionId":1,"modelName":"a, b"}]', "Civitai metadata": "{}",
    "ENSD": "0", "Conditional mask weight": "1.0", "Tiling": "False", "Variation seed strength": "0",
}  # fmt: skip


def said(pairs: dict[str, str]) -> tuple:
    found = options("a fox\n" + ", ".join(f"{key}: {value}" for key, value in pairs.items()), "x")
    return found.options, found.beside, found.names, [text for text, _ in found.left]


def base() -> dict[str, str]:
    return dict(pair.split(": ") for pair in PLAIN.split(", "))


@pytest.mark.parametrize("key", KEYS_THAT_CHANGE_PIXELS)
def test_a_key_that_changes_pixels_is_used_or_named(key):
    *before, named = said(base())
    *after, named_now = said(base() | {key: KEYS_THAT_CHANGE_PIXELS[key]})
    assert named == []
    assert after != before or any(
        word in " ".join(named_now) for word in (key, key.split(" ")[0], key.split("_")[0], key.lower(), "noise of")
    )


@pytest.mark.parametrize("key", KEYS_THAT_CHANGE_NONE)
def test_a_key_that_changes_no_pixel_is_passed_over(key):
    options_, beside, _, named = said(base() | {key: KEYS_THAT_CHANGE_NONE[key]})
    assert (options_, beside, named) == (*said(base())[:2], [])


@given(st.text(string.ascii_letters + " ", min_size=3, max_size=20).map(str.strip), st.integers(2, 99))
@settings(max_examples=200, deadline=None)
def test_a_key_that_nobody_knows_is_named(key, value):
    known = {*base(), *HARMLESS, *KEYS_THAT_CHANGE_NONE, *KEYS_THAT_CHANGE_PIXELS}
    if key and key.split(" ")[0] not in {name.split(" ")[0] for name in known}:
        assert any(str(value) in text for text in said(base() | {key: str(value)})[3])


def test_what_is_named_is_one_line_and_what_a_flag_answers_is_not(tmp_path, capsys):
    text = (
        f"a fox\n{PLAIN}, Hires upscale: 1, Model: any-v4, Denoising strength: 0.5, FreeU Stages: [x], FreeU Version: 2"
    )
    path = picture(tmp_path / "x.png", text)
    parse(GenerateConfig, ["--from", path])
    (line,) = capsys.readouterr().out.splitlines()
    assert all(
        word in line
        for word in ("Hires (upscale 1)", "model 'any-v4'", "--strength 0.5", "FreeU (Stages [x], Version 2)")
    )
    (tmp_path / "any.safetensors").touch()
    with pytest.raises(BadInput):  # an empty file, but it is the user's choice
        parse(GenerateConfig, ["--from", path, "-m", str(tmp_path / "any.safetensors")])
    parse(GenerateConfig, ["--from", path, "--init_image", path])
    (line,) = capsys.readouterr().out.splitlines()
    assert "Hires" not in line and "FreeU" in line


# The forms of the text


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"a fox\n{PLAIN}\nTemplate: a {{fox|cat}}\nNegative Template: b", {"prompt": "a fox", "steps": 20}),
        (f'a fox\n{PLAIN}, Wildcard prompt: "__animal__\n  of two lines"', {"prompt": "a fox", "steps": 20, "seed": 5}),
        (f'a fox\n{PLAIN}, Civitai resources: [{{"a":"b, Seed: 9"}}], Civitai metadata: {{}}', {"seed": 5}),
        ("a\nSteps: 20.0, Seed: 5.0, CFG scale: 7, Size: 64x64", {"steps": 20, "seed": 5, "cfg_scale": 7.0}),
        (
            "Steps: 9, a line of the prompt\nNegative prompt: b\nSteps: 20, Seed: 5",
            {"steps": 20, "negative_prompt": "b"},
        ),
        ("a\r\nNegative prompt: b\r\nSteps: 20, Seed: 5", {"prompt": "a", "negative_prompt": "b", "steps": 20}),
        ("a\nSteps: 20, Seed: 18446744073709551615", {"seed": 2**32 - 1}),
        ("a\nSteps: 20, Seed: -1", {"seed": -1}),
        ("a\nSampler: Euler, Steps: 20, Seed: 5", {"scheduler": "euler", "steps": 20}),
    ],
)
def test_the_text_is_read_as_programs_write_it(text, expected):
    found = options(text, "x")
    assert {name: found.options[name] for name in expected} == expected


def test_what_stands_behind_the_parameters_is_named():
    assert any("what stands behind" in text for text in said_of(f"a\n{PLAIN}\nsomething: else"))
    assert not said_of(f"a\n{PLAIN}\nTemplate: a\nsomething: else")


def said_of(text: str) -> list[str]:
    return [text for text, _ in options(text, "x").left]


def test_the_torch_generator_takes_32_bits_of_a_seed():
    """So that a seed of 64 bits gives the same noise as its lower half."""
    large = 0x123456789ABCDEF0
    a, b = (torch.Generator().manual_seed(seed) for seed in (large, large % 2**32))
    assert torch.equal(torch.randn(9, generator=a), torch.randn(9, generator=b))
    assert options(f"a\nSteps: 5, Seed: {large}", "x").options["seed"] == large % 2**32


def test_a_seed_beyond_64_bits_and_a_size_that_is_none_of_ours_say_what_to_do(tmp_path, capsys):
    path = picture(tmp_path / "x.png", f"a\nSteps: 5, Seed: {2**64}, Size: 64x64, RNG: CPU")
    with pytest.raises(BadInput, match="give --seed"):
        parse(GenerateConfig, ["--from", path])
    path = picture(tmp_path / "y.png", f"a\nSteps: 5, Seed: {2**64 - 1}, Size: 1001x600, RNG: CPU")
    with pytest.raises(BadInput, match=r"width=1001 .* the nearest is 1000"):
        parse(GenerateConfig, ["--from", path])
    config = parse(GenerateConfig, ["--from", path, "-W", "1000"])
    assert (config.width, config.height, config.seed) == (1000, 600, 2**32 - 1)
    assert "is taken as 4294967295, from which a CPU draws the same noise" in capsys.readouterr().out


# The files that they stand in


def picture(path, text: str) -> str:
    info = PngInfo()
    info.add_text("parameters", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return str(path)


COMMENTS = {
    "A1111's: UNICODE, large end first": lambda text: b"UNICODE\0" + text.encode("utf-16-be"),
    "small end first": lambda text: b"UNICODE\0" + text.encode("utf-16-le"),
    "a mark of order": lambda text: b"UNICODE\0" + text.encode("utf-16"),
    "ASCII": lambda text: b"ASCII\0\0\0" + text.encode("utf-8"),
    "undefined": lambda text: bytes(8) + text.encode("utf-8"),
    "UTF-8 under UNICODE": lambda text: b"UNICODE\0" + text.encode("utf-8"),
    "no code": lambda text: text.encode("utf-8") + b"\0",
}
CHINESE = f"a fox, é 狐狸\nNegative prompt: 模糊\n{PLAIN}"


@pytest.mark.parametrize("form", COMMENTS)
@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_jpeg_and_webp_with_a_user_comment_are_read(tmp_path, suffix, form):
    path, exif = tmp_path / f"x.{suffix}", Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = COMMENTS[form](CHINESE)
    Image.new("RGB", (16, 16)).save(path, exif=exif)
    config = parse(GenerateConfig, ["--from", str(path)])
    assert (config.prompt, config.negative_prompt, config.seed) == ("a fox, é 狐狸", "模糊", 5)


def test_a_gif_s_comment_is_read_and_a_photograph_is_refused(tmp_path):
    Image.new("P", (8, 8)).save(tmp_path / "x.gif", comment=CHINESE.encode())
    assert parse(GenerateConfig, ["--from", str(tmp_path / "x.gif")]).seed == 5
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
    with pytest.raises(BadInput, match="holds no options"):
        parse(GenerateConfig, ["--from", str(tmp_path / "photo.jpg")])


# Tiled Diffusion's block

BLOCK = {
    "Method": "MultiDiffusion", "Tile tile width": 64, "Tile tile height": 48, "Tile Overlap": 60, "Tile batch size": 2,
    "Region control": {
        "Region 1": {"enable": True, "x": 0.5, "y": 0.0, "w": 0.7, "h": 1.0, "prompt": "it's a cat", "neg_prompt": "",
                     "blend_mode": "Foreground", "feather_ratio": 0.2, "seed": 77},
        "Region 2": {"enable": True, "x": 0.0, "y": 0.0, "w": 0.4, "h": 1.0, "prompt": "b", "neg_prompt": "c",
                     "blend_mode": "Background", "feather_ratio": 0.2, "seed": 78},
    },
}  # fmt: skip


def with_block(block: dict) -> str:
    return f"a\n{PLAIN}, Tiled Diffusion: {json.dumps(str(block))}, Version: v1.6"


def test_tiled_diffusion_s_block_is_read_with_its_regions(tmp_path, capsys):
    path = picture(tmp_path / "x.png", with_block(BLOCK))
    config = parse(GenerateConfig, ["--from", path])
    assert (config.tiled_diffusion, config.tile_weights, config.tile_batch_size) == ("multidiffusion", "uniform", 2)
    assert (config.tile_width, config.tile_height, config.overlap, config.regions) == (64, 48, 44, path)
    assert capsys.readouterr().out == ""
    first, second = read_regions(config.regions)
    assert (first.prompt, first.blend_mode, first.seed, first.x, first.w) == ("it's a cat", "foreground", 77, 0.5, 0.5)
    assert (second.prompt, second.negative_prompt, second.seed) == ("b", "c", 78)
    assert "reaches over the border, clipped to x=0.5 y=0 w=0.5 h=1" in capsys.readouterr().out


def test_noise_inversion_counts_beside_the_picture_that_was_inverted(tmp_path, capsys):
    block = {"Method": "Mixture of Diffusers", "NoiseInv": True, "NoiseInv Steps": 12, "NoiseInv Retouch": 2.0,
             "NoiseInv Renoise strength": 0.5, "NoiseInv Kernel size": 32, "Upscaler": "4x", "Upscale factor": 2.0}  # fmt: skip
    path = picture(tmp_path / "x.png", with_block(block))
    config = parse(GenerateConfig, ["--from", path])
    assert config.tiled_diffusion == "mixture" and config.noise_inversion == 0
    assert "noise inversion of another picture; give it as --init_image" in capsys.readouterr().out
    config = parse(GenerateConfig, ["--from", path, "--init_image", path])
    found = config.noise_inversion, config.retouch, config.renoise_strength, config.renoise_kernel
    assert found == (12, 2.0, 0.5, 32) and capsys.readouterr().out == ""


LONG = "{'a': '" + "x" * 10**6 + "'}"


@pytest.mark.parametrize(
    "block", ["{", "[1]", "{1: 2}", "{'Tile tile width': 'x'}", "__import__('os')", "{" * 9999, LONG]
)
def test_a_damaged_block_is_one_line(block):
    with pytest.raises(BadInput, match="damaged") as error:
        options(f"a\n{PLAIN}, Tiled Diffusion: {json.dumps(block)}", "x.png")
    assert "\n" not in str(error.value)


def test_demofusion_and_forge_s_tiles_and_hypertile():
    assert "tiles by 'DemoFusion'" in said_of(with_block({"Method": "DemoFusion", "Window Size": 128}))
    forge = {"multidiffusion_enabled": "True", "multidiffusion_method": "Mixture of Diffusers", "multidiffusion_tile_width": "768",
             "multidiffusion_tile_height": "512", "multidiffusion_tile_overlap": "64", "multidiffusion_tile_batch_size": "4"}  # fmt: skip
    found, *_, named = said(base() | forge)
    tiles = (
        found["tiled_diffusion"],
        found["tile_width"],
        found["tile_height"],
        found["overlap"],
        found["tile_batch_size"],
    )
    assert tiles == ("mixture", 96, 64, 8, 4) and not named
    found, *_, named = said(base() | {"Hypertile U-Net": "True", "Hypertile U-Net max depth": "1"})
    assert (found["hypertile"], found["hypertile_swap"], found["hypertile_depth"], named) == (256, 3, 1, [])


# Names of files


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    (folder / "below").mkdir(parents=True)
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, folder / "below" / "Fur.safetensors", {"a": "b"})
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, folder / "other.safetensors")
    save_file({"emb_params": torch.ones(1, 96)}, folder / "easy.safetensors")
    return folder


@pytest.mark.parametrize(
    "tag",
    ["<lora:fur:0.5>", "<lora:FUR:.5>", "<lora:fur.safetensors:0.5>", "<lyco:fur:0.5:0.5>", "<lora:fur:unet=0.5>"],
)
def test_a_lora_by_name_is_looked_for_below_lora_dir(library, tag):
    config = parse(GenerateConfig, ["-p", f"a fox {tag}, snow", "--lora_dir", str(library)])
    assert (config.prompt, config.lora) == ("a fox, snow", f"{library / 'below' / 'Fur.safetensors'}:0.5")


def test_a_lora_that_was_renamed_is_known_by_its_hash_and_one_that_is_given_has_the_prompt_s_weight(library, tmp_path):
    fur, other = library / "below" / "Fur.safetensors", library / "other.safetensors"
    assert lora_sha256(fur) != lora_sha256(other) and lora_sha256(fur) != file_sha256(fur)
    text = f'a <lora:gone:0.5>\n{PLAIN}, Lora hashes: "gone: {lora_sha256(other)[:12]}"'
    config = parse(GenerateConfig, ["--from", picture(tmp_path / "x.png", text), "--lora_dir", str(library)])
    assert config.lora == f"{other}:0.5" and config.prompt == "a"
    config = parse(GenerateConfig, ["-p", "a <lora:fur:0.25>", "--lora", f"{fur}:0.8,{other}"])
    assert config.lora == f"{fur}:0.25,{other}:1.0"


def test_the_model_the_vae_and_embeddings_of_a_picture_are_looked_for(library, tmp_path, capsys):
    named = f'Model: any, VAE: v.pt, TI hashes: "easy: {file_sha256(library / "easy.safetensors")[:12]}, gone: 0123456789ab"'
    path = picture(tmp_path / "x.png", f"a easy\n{PLAIN}, {named}")
    config = parse(GenerateConfig, ["--from", path, "--embedding_dir", str(library)])
    assert config.embeddings == str(library / "easy.safetensors")
    line = capsys.readouterr().out
    assert "model 'any' (give -m, or --model_dir where it lies)" in line and "vae 'v.pt'" in line
    assert f"embedding 'gone' (hash 0123456789; is not in {library})" in line and "'easy'" not in line
    with pytest.raises(BadInput, match="looks like"):  # found, and it is no model
        (library / "any.safetensors").write_bytes((library / "other.safetensors").read_bytes())
        parse(GenerateConfig, ["--from", path, "--model_dir", str(library)])


def test_we_write_the_names_that_a1111_writes(tmp_path):
    given = dict(vae="x/vae-ft.safetensors", init_image="x.png", strength=0.5, width=64, height=64)
    config = GenerateConfig(prompt="a", seed=1, **given).filled()
    lora = UsedLora(tmp_path / "fur.safetensors", 0.75, "ab" * 32)
    text = parameters(to_dict(config), "any-v4.safetensors", "f" * 64, "", [lora], "cd" * 32)
    prompt, line = text.split("\n")
    assert prompt == "a <lora:fur:0.75>" and 'Lora hashes: "fur: abababababab"' in line
    assert "Model: any-v4," in line and "Denoising strength: 0.5" in line and "VAE: vae-ft.safetensors" in line
    assert "VAE hash: cdcdcdcdcd" in line and line.endswith("RNG: CPU")
    found = options(text, "x")
    assert found.names == {
        "model": [("any-v4", "f" * 10)],
        "vae": [("vae-ft.safetensors", "cd" * 5)],
        "lora": [("fur", "ab" * 6)],
    }
