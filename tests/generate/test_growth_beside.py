"""Each way to grow beside what else a picture is drawn with: hints, LoRAs, regions, circular borders."""

import copy
import json
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.generate import order
from sd_hyena.generate.generation import generate
from sd_hyena.generate.order import Order
from sd_hyena.options.generate_config import GenerateConfig
from tests.fixtures import controlnet_of
from tests.gate import gated

METHODS = ("redraw", "diffusehigh", "demofusion", "deep_shrink", "hidiffusion")
pytestmark = pytest.mark.usefixtures("small_model", "loaded_once")


@pytest.fixture
def small_model(monkeypatch):
    """The shipped model as if it had been trained at 80 px: 104x72 px grow from 96x64."""
    monkeypatch.setattr(order, "own_side", lambda _: 80)


@pytest.fixture(scope="module")
def files(shared_pipe, tmp_path_factory):
    """Two ControlNets, their hint, a LoRA and a region with a seed, at places where they lie."""
    root = tmp_path_factory.mktemp("beside")
    for seed, name in enumerate("ab"):
        controlnet_of(shared_pipe.unet, seed).save_pretrained(root / name)
    unet = copy.deepcopy(shared_pipe.unet)
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    StableDiffusionPipeline.save_lora_weights(root / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
    hint = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    Image.fromarray(hint).resize((208, 144)).save(root / "hint.png")
    region = dict(x=0, y=0, w=1, h=1, blend_mode="Background", seed=3)
    (root / "regions.json").write_text(json.dumps({"bbox_controls": [region]}))
    return root


def config(tmp_path, **given):
    small = dict(width=104, height=72, steps=2, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle on blue")
    return GenerateConfig(**small | dict(out_dir=str(tmp_path)) | given)


def drawn(tmp_path, **given):
    return np.array(Image.open(generate(config(tmp_path, **given))[-1])).astype(int)


def distance(a, b):
    return np.abs(a - b).mean()


DAILY = ("redraw", "regions"), ("deep_shrink", "lora"), ("hidiffusion", "controlnet")
EVERY = [*DAILY, *gated(one for one in product(METHODS, ("controlnet", "lora", "regions")) if one not in DAILY)]


@pytest.mark.parametrize("method, what", EVERY)
def test_what_stands_beside_a_picture_acts_in_every_method_as_much_as_it_is_told(tmp_path, files, method, what):
    plain = drawn(tmp_path, grow=method)
    if what == "regions":
        regional = dict(grow=method, regions=str(files / "regions.json"))
        one, other = (drawn(tmp_path, **regional, seed=seed) for seed in (11, 12))
        assert distance(one, other) < 0.6 * distance(plain, drawn(tmp_path, grow=method, seed=12))
        one, other = (drawn(tmp_path, **regional, seed=seed, save_stages=True) for seed in (11, 12))
        assert np.array_equal(one, other)  # the first stage, or the only one, has no other noise
    else:
        lora = files / "lora" / "pytorch_lora_weights.safetensors"
        control = dict(controlnet=str(files / "a"), control_image=str(files / "hint.png"))
        given = {
            "lora": lambda much: dict(lora=f"{lora}:{much}"),
            "controlnet": lambda much: control | dict(control_scale=much),
        }[what]
        none, some = (drawn(tmp_path, grow=method, **given(much)) for much in (0.0, 1.0))
        assert np.array_equal(none, plain) and distance(some, plain) > 0.05
    assert np.array_equal(drawn(tmp_path, grow=method), plain)


def test_pictures_beside_have_the_canvas_s_shape_and_are_stretched_to_each_stage_s(tmp_path, files):
    Image.open(files / "hint.png").resize((208, 164)).save(tmp_path / "high.png")
    control = dict(controlnet=str(files / "a"), control_image=str(files / "hint.png"))
    stages = Order.of(config(tmp_path, grow="redraw", init_image=str(tmp_path / "high.png"), **control)).stages
    hint, high = Image.open(files / "hint.png"), Image.open(tmp_path / "high.png")
    sizes = [(96, 64), (104, 72)]
    assert [stage.task.hints[0].size for stage in stages] == sizes
    for stage, size in zip(stages, sizes, strict=True):
        assert np.array_equal(stage.task.hints[0], hint.resize(size, Image.Resampling.LANCZOS))
    middle = high.crop((0, 10, 208, 154)).resize((96, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(stages[0].task.pictures["init_image"], middle)
    (note,) = stages[0].task.notes
    assert "init_image is 208x164, of another shape than 104x72, and its middle is drawn again" in note
    with pytest.raises(BadInput, match=r"control_image=.* is 208x164, of another shape than the 104x72 picture"):
        Order.of(config(tmp_path, grow="redraw", **control | dict(control_image=str(tmp_path / "high.png"))))


@pytest.mark.gate
@pytest.mark.parametrize("method", ["demofusion", "deep_shrink"])
def test_of_several_controlnets_each_acts_by_its_scale(tmp_path, files, method):
    hint = str(files / "hint.png")
    one = drawn(tmp_path, grow=method, controlnet=str(files / "a"), control_image=hint, control_scale=0.7)
    both = dict(controlnet=f"{files / 'a'},{files / 'b'}", control_image=f"{hint},{hint}", grow=method)
    assert np.array_equal(drawn(tmp_path, **both, control_scale="0.7,0"), one)
    assert distance(drawn(tmp_path, **both, control_scale="0.7,0.7"), one) > 0.05


@pytest.mark.parametrize("method", [*gated(["redraw", "diffusehigh", "hidiffusion"]), "deep_shrink"])
def test_a_circular_picture_grows_turned_from_noise_that_is_turned(tmp_path, monkeypatch, method):
    """128x64, then 256x128 px; every noise is turned by half of its width, and so has to be the picture."""
    monkeypatch.setattr(order, "own_side", lambda _: 91)
    given = dict(width=256, height=128, circular=True, grow=method, cfg_scale=1.0)
    plain = drawn(tmp_path, **given)
    for module in (
        "pipelines.stable_diffusion.pipeline_stable_diffusion",
        "pipelines.stable_diffusion.pipeline_stable_diffusion_img2img",
        "models.autoencoders.vae",
    ):
        name = f"diffusers.{module}.randn_tensor"
        original = pytest.importorskip(f"diffusers.{module}").randn_tensor
        turned = lambda shape, *rest, original=original, **more: original(shape, *rest, **more).roll(shape[-1] // 2, -1)
        monkeypatch.setattr(name, turned)
    assert np.abs(np.roll(plain, 128, 1) - drawn(tmp_path, **given)).max() <= 3
