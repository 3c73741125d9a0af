"""ControlNets as people have them: every container holds the same network, to the bit; what is none is told by its name."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.models.controlnet import check_controlnet, load_controlnet
from sd_hyena.models.lora.applied import Given, loras_in
from sd_hyena.models.lora.lora_file import read_lora
from sd_hyena.models.vae import check_vae
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from tests.conftest import IN01
from tests.files_in_the_wild.adapters import in_the_original_layout, tensors_of, written
from tests.fixtures import controlnet_of
from tests.gate import sampled
from tests.generate.test_large_images import drawn
from tests.ldm import single_file


@pytest.fixture(scope="module")
def net(shared_pipe):
    return controlnet_of(shared_pipe.unet, 3)


def same(found, net, dtype=torch.float32) -> bool:
    expected = {name: value.to(dtype).float() for name, value in net.state_dict().items()}
    return found.state_dict().keys() == expected.keys() and all(
        torch.equal(value, expected[name]) for name, value in found.state_dict().items()
    )


def of_diffusers(net, pipe):
    return dict(net.state_dict())


FORMS = {
    "the original layout": lambda net, pipe: in_the_original_layout(net),
    "the original layout without its prefix": lambda net, pipe: in_the_original_layout(net, ""),
    "with the base model beside it": lambda net, pipe: single_file(pipe, "sd15") | in_the_original_layout(net),
    "diffusers' single file": of_diffusers,
}


FILES = (torch.float32, ".safetensors"), (torch.float16, ".pth"), (torch.bfloat16, ".ckpt")


@pytest.mark.parametrize("form, file", sampled(product(FORMS, FILES), 4))
def test_a_file_in_any_layout_is_the_controlnet_that_was_stored(shared_pipe, net, tmp_path, form, file):
    dtype, suffix = file
    path = written(tmp_path / f"net{suffix}", FORMS[form](net, shared_pipe), dtype)
    check_controlnet(str(path))
    assert same(load_controlnet(str(path), shared_pipe.unet), net, dtype)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_is_read_whatever_its_variant(shared_pipe, net, tmp_path, variant, safe):
    net.save_pretrained(tmp_path, variant=variant, safe_serialization=safe)
    check_controlnet(str(tmp_path))
    assert same(load_controlnet(str(tmp_path), shared_pipe.unet), net)


def test_a_state_dict_within_a_checkpoint_is_found(shared_pipe, net, tmp_path):
    torch.save({"epoch": 3, "state_dict": in_the_original_layout(net)}, tmp_path / "net.pth")
    check_controlnet(str(tmp_path / "net.pth"))
    assert same(load_controlnet(str(tmp_path / "net.pth"), shared_pipe.unet), net)


def test_a_configuration_beside_the_file_wins(shared_pipe, net, tmp_path):
    path = written(tmp_path / "net.safetensors", of_diffusers(net, None))
    ControlNetModel.from_config({**net.config, "norm_num_groups": 8}).save_config(tmp_path / "net")
    assert load_controlnet(str(path), shared_pipe.unet).config.norm_num_groups == 8
    assert net.config.norm_num_groups == 16


def test_a_difference_from_the_model_is_added_to_its_own_weights_whatever_lora_is_in_them(pipe, net, tmp_path):
    own = pipe.unet.state_dict()
    difference = {name: value - own[name] if name in own else value for name, value in net.state_dict().items()}
    path = written(tmp_path / "net.safetensors", difference | {"difference": torch.ones(1)})
    lora, _ = tensors_of(pipe, "DoRA", {"unet": [f"{IN01}.to_q", "conv_in"]})
    with loras_in(pipe, [Given(read_lora(written(tmp_path / "x.safetensors", lora)))]):
        found = load_controlnet(str(path), pipe.unet).state_dict()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("plain", [False, True])
def test_sdxl_s_and_those_without_attention_take_their_sizes_from_the_unet_and_their_tensors(
    tiny_sdxl, tmp_path, plain
):
    config = ControlNetModel.from_unet(tiny_sdxl.unet, conditioning_embedding_out_channels=(4, 8, 16)).config
    changes = {"down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"} if plain else {}
    torch.manual_seed(0)
    net = ControlNetModel.from_config({**config, **changes})
    path = written(tmp_path / "net.safetensors", of_diffusers(net, None))
    assert same(load_controlnet(str(path), tiny_sdxl.unet), net)


@pytest.mark.gate
def test_a_picture_is_the_same_with_the_file_as_with_the_folder(shared_pipe, net, tmp_path, loaded_once):
    net.save_pretrained(tmp_path / "folder")
    path = written(tmp_path / "net.pth", in_the_original_layout(net))
    Image.new("RGB", (136, 96), "red").save(tmp_path / "hint.png")
    given = dict(control_image=str(tmp_path / "hint.png"))
    file, folder = (drawn(tmp_path, **given, controlnet=str(one)) for one in (path, tmp_path / "folder"))
    assert np.array_equal(file, folder) and not np.array_equal(file, drawn(tmp_path))
    both = dict(control_image=f"{given['control_image']},{given['control_image']}", control_scale="0.5,0.5")
    assert np.abs(drawn(tmp_path, **both, controlnet=f"{path},{tmp_path / 'folder'}").astype(int) - file).max() <= 1


ONE = torch.ones(2, 2)
OTHERS = {
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": ONE, "conv_in.weight": ONE},
    "a T2I-Adapter; of": {"body.0.block1.weight": ONE, "conv_in.weight": ONE},
    "a control-LoRA": {"lora_controlnet": ONE, "input_hint_block.0.weight": ONE, "input_blocks.0.0.weight": ONE},
    "a ControlNet-LLLite": {"lllite_unet_down_blocks_0.conditioning1.0.weight": ONE},
    "a union of ControlNets": {"task_embedding": ONE, "controlnet_cond_embedding.conv_in.weight": ONE},
    "an IP-Adapter": {"image_proj.proj.weight": ONE, "ip_adapter.1.to_k_ip.weight": ONE},
    "a LoRA; give it as --lora": {"lora_unet_conv_in.lora_down.weight": ONE},
    "a VAE; give it as --vae": {"decoder.conv_in.weight": ONE},
    "a Stable Diffusion model; give it as -m": {"model.diffusion_model.input_blocks.0.0.weight": ONE},
    "no file of weights that is known here": {"x": ONE},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_controlnet_is_called_by_its_name_before_a_model_is_loaded(tmp_path, kind):
    Image.new("RGB", (64, 64)).save(tmp_path / "hint.png")
    path = written(tmp_path / "net.safetensors", OTHERS[kind])
    with pytest.raises(BadInput, match=f"controlnet='.*net.safetensors' looks like {kind}") as error:
        parse(GenerateConfig, ["--controlnet", str(path), "--control_image", str(tmp_path / "hint.png")])
    path = written(tmp_path / "net.pth", OTHERS[kind])
    with pytest.raises(BadInput, match=f"controlnet='.*net.pth' looks like {kind}"):
        check_controlnet(str(path))
    assert "\n" not in str(error.value)


def without(state, part):
    return {name: value for name, value in state.items() if part not in name}


UNFIT = {
    "a layer is missing": (lambda s: without(s, "zero_convs.3.0.bias"), "does not suit this model: its ControlNet lacks"),
    "the first layer is missing": (lambda s: without(s, "input_hint_block.0.weight"), "layers that are not known here|lacks"),
    "a stranger is in it": (
        lambda s: s | {"control_model.input_blocks.1.5.weight": ONE}, "has layers that are not known here"),
    "another shape": (
        lambda s: s | {"control_model.time_embed.0.weight": ONE}, r"its ControlNet has .* of \(2, 2\), not of \(128, 32\)"),
    "NaN": (
        lambda s: s | {"control_model.time_embed.0.bias": torch.full((128,), torch.nan)},
        "its ControlNet is damaged: .* holds NaN"),
    "whole numbers": (
        lambda s: s | {"control_model.time_embed.0.bias": torch.ones(128, dtype=int)}, "is damaged: .* whole numbers"),
    "another width of text": (
        lambda s: {n: v.repeat(1, 2) if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else v for n, v in s.items()},
        "it reads text of width 192, this model's is 96; give one that was trained for it"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_is_not_whole_or_of_another_model_is_refused_in_one_line(shared_pipe, net, tmp_path, case):
    change, said = UNFIT[case]
    path = written(tmp_path / "net.safetensors", change(in_the_original_layout(net)))
    with pytest.raises(BadInput, match=said) as error:
        check_controlnet(str(path))
        load_controlnet(str(path), shared_pipe.unet)
    assert "net.safetensors" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_that_lacks_a_tensor_or_is_of_other_sizes_is_refused(shared_pipe, net, tmp_path):
    """diffusers fills what is missing with random numbers, and a picture fails at the first sum."""
    net.save_pretrained(tmp_path / "cut")
    state = without(net.state_dict(), "controlnet_mid_block.bias")
    written(tmp_path / "cut" / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(BadInput, match=r"does not suit this model: its ControlNet lacks controlnet_mid_block\.bias"):
        load_controlnet(str(tmp_path / "cut"), shared_pipe.unet)
    wide = {**net.config, "block_out_channels": [32, 64, 96, 128]}
    ControlNetModel.from_config(wide).save_pretrained(tmp_path / "wide")
    with pytest.raises(
        BadInput, match=r"its block_out_channels are \[32, 64, 96, 128\], the model's \[32, 64, 96, 96\]"
    ):
        load_controlnet(str(tmp_path / "wide"), shared_pipe.unet)
    net.to(torch.float32).save_pretrained(tmp_path / "nan")
    damaged = {n: v.clone() for n, v in net.state_dict().items()}
    damaged["conv_in.bias"][3] = torch.inf
    written(tmp_path / "nan" / "diffusion_pytorch_model.safetensors", damaged)
    with pytest.raises(BadInput, match=r"its ControlNet is damaged: conv_in\.bias holds NaN, infinities"):
        load_controlnet(str(tmp_path / "nan"), shared_pipe.unet)


def test_a_vae_s_folder_that_lacks_a_tensor_is_refused_too(shared_pipe, tmp_path):
    shared_pipe.vae.save_pretrained(tmp_path / "vae")
    state = without(shared_pipe.vae.state_dict(), "decoder.conv_out.bias")
    written(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", state)
    with pytest.raises(BadInput, match=r"its vae lacks decoder\.conv_out\.bias"):
        check_vae(str(tmp_path / "vae"))
