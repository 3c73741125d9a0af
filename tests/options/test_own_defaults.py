"""What a model is best drawn with: by itself, by its layout, by a generation.json; and what a config leaves to it."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import write_image
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.own_defaults import OwnDefaults, own_defaults

TEXTS = {  # what a text encoder's tensors are called in the wild, and the size and guidance that the model is published with
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": (512, 7),
    "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias": (512, 7),
    "cond_stage_model.model.transformer.resblocks.0.ln_1.bias": (768, 7),
    "conditioner.embedders.1.model.transformer.resblocks.0.ln_1.bias": (1024, 5),
    "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias": (1024, 5),
}


def tensors(text: str) -> dict[str, torch.Tensor]:
    return {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), text: torch.zeros(1)}


@pytest.mark.parametrize("text", TEXTS)
def test_a_single_file_is_drawn_at_the_size_of_its_layout(tmp_path, text):
    save_file(tensors(text), tmp_path / "a.safetensors")
    torch.save({"state_dict": tensors(text)}, tmp_path / "b.ckpt")
    torch.save({"state_dict": tensors(text)}, tmp_path / "c.ckpt", _use_new_zipfile_serialization=False)
    side, guidance = TEXTS[text]
    for name in ("a.safetensors", "b.ckpt", "c.ckpt"):
        config = parse(GenerateConfig, ["-m", str(tmp_path / name)])
        assert (config.width, config.height, config.cfg_scale, config.steps) == (side, side, guidance, 30)
        assert config.prompt is None  # one of the list for natural images, once it is loaded


def test_a_file_may_note_its_size_and_nonsense_counts_for_nothing(tmp_path):
    for noted, expected in (("768x512", (768, 512)), ("7x7", (512, 512)), ("9999x9999", (512, 512)), ("x", (512, 512))):
        save_file(tensors(next(iter(TEXTS))), tmp_path / f"{noted}.safetensors", {"modelspec.resolution": noted})
        own = own_defaults(str(tmp_path / f"{noted}.safetensors"))
        assert (own.width, own.height) == expected
    for name in ("gone", "a.ckpt", "b.safetensors"):
        (tmp_path / "a.ckpt").write_bytes(b"PK\3\4 cut")
        (tmp_path / "b.safetensors").write_bytes(b"cut")
        assert own_defaults(str(tmp_path / name)) == OwnDefaults()


def test_a_folder_is_drawn_at_the_size_of_its_unet(tmp_path):
    (tmp_path / "unet").mkdir()
    for kind, cells, expected in (
        ("StableDiffusionPipeline", 64, (512, 512, 7)),
        ("StableDiffusionXLPipeline", 128, (1024, 1024, 5)),
        ("StableDiffusionPipeline", [40, 56], (448, 320, 7)),
        ("StableDiffusionPipeline", "many", (512, 512, 7)),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": cells}))
        own = own_defaults(str(tmp_path))
        assert (own.width, own.height, own.cfg_scale) == expected


def test_generation_json_wins_in_a_folder_beside_a_file_and_for_a_file_that_is_described_by_a_folder(tmp_path):
    said = {"width": 384, "steps": 8, "cfg_scale": 1, "prompt": "a fox"}
    expected = OwnDefaults(width=384, height=384, steps=8, cfg_scale=1.0, prompt="a fox")
    file = tmp_path / "v1.5.safetensors"
    save_file(tensors(next(iter(TEXTS))), file)
    (tmp_path / "v1.5.generation.json").write_text("\ufeff" + json.dumps(said), "utf-8")
    assert own_defaults(str(file)) == expected
    (tmp_path / "v1.5").mkdir()
    (tmp_path / "v1.5" / "generation.json").write_text(json.dumps({"height": 640}))
    assert own_defaults(str(file)) == OwnDefaults(height=640)
    assert own_defaults(str(tmp_path / "v1.5")) == OwnDefaults(height=640)
    assert own_defaults() == OwnDefaults(width=256, height=256, steps=25, cfg_scale=3.0, prompt="a red circle on white")


BAD = {
    "{": "cannot be read",
    "[]": "holds no mapping of width",
    '{"sampler": "ddim"}': "unknown option 'sampler'",
    '{"width": 65}': "width=65 must be a multiple of 8",
    '{"steps": 0}': "steps=0 must be",
    '{"steps": 2.5}': "steps=2.5 must be a whole number",
    '{"steps": true}': "steps=True must be a whole number",
    '{"cfg_scale": NaN}': "cfg_scale=nan must be a number",
    '{"prompt": "\\ud800"}': "no Unicode text",
}


@pytest.mark.parametrize("text", BAD)
def test_a_damaged_generation_json_is_named_in_one_line(tmp_path, text):
    (tmp_path / "generation.json").write_text(text)
    with pytest.raises(BadInput, match=r"generation\.json") as error:
        own_defaults(str(tmp_path))
    assert BAD[text] in str(error.value) and "\n" not in str(error.value)


def test_what_is_given_wins_and_the_resolved_config_leaves_nothing_open():
    config = parse(GenerateConfig, ["-W", "64", "-s", "3", "-c", "0", "-p", ""])
    assert (config.width, config.height, config.steps, config.cfg_scale, config.prompt) == (64, 64, 3, 0.0, "")
    config = parse(GenerateConfig, ["-H", "64"])
    assert (config.width, config.height, config.steps, config.cfg_scale) == (256, 64, 25, 3.0)
    assert parse(GenerateConfig, ["-W", "0"]) == parse(GenerateConfig, [])


def test_a_picture_of_the_version_before_is_repeated_with_its_numbers(tmp_path):
    """Its config says all of them, a height of 0 for a square; a start was drawn in the canvas's shape."""
    Image.new("RGB", (32, 16)).save(tmp_path / "start.png")
    former = dict(width=512, height=0, steps=30, cfg_scale=7.0, prompt="a fox", seed=3, num_images=1, model="")
    for more in ({}, {"init_image": str(tmp_path / "start.png")}, {"height": 256}):
        write_image(tmp_path / "x.png", Image.new("RGB", (8, 8)), "", {"config": former | more})
        (path,) = tmp_path.glob("x*.png")
        config = parse(GenerateConfig, ["--from", str(path)])
        path.unlink()
        assert (config.width, config.height) == (512, more.get("height", 512))
        assert (config.steps, config.cfg_scale, config.prompt, config.scale) == (30, 7.0, "a fox", 0)
        assert to_dict(config)["height"] in (more.get("height", 0), 512 if "init_image" in more else 0)
