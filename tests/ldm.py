"""A diffusers pipeline's tensors under the names of the original Stable Diffusion: what single files hold."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IN_THE_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_AN_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
IN_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
}


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(ours)}(?=\.|$)", theirs, name)
    return name


def of_unet(unet: nn.Module) -> dict[str, Tensor]:
    each = unet.config.layers_per_block + 1
    state = {}
    for name, value in unet.state_dict().items():
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name):
            side, block, part, j, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            number = block * each + (each - 1 if part.endswith("samplers") else j) + (side == "down")
            place = {"resnets": "0", "attentions": "1", "downsamplers": "0"}.get(part)
            if part == "upsamplers":
                place = "2" if hasattr(unet.up_blocks[block], "attentions") else "1"
            if part == "downsamplers":
                rest = rest.replace("conv.", "op.")
            name = f"{'input' if side == 'down' else 'output'}_blocks.{number}.{place}.{rest}"
        else:
            name = _renamed(name, IN_THE_UNET)
        if re.match(r"(input|output)_blocks\.\d+\.0\.|middle_block\.[02]\.", name):
            name = _renamed(name, IN_A_RESNET)
        state[f"model.diffusion_model.{name}"] = value
    return state


def of_vae(vae: nn.Module, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    last = len(vae.config.up_block_types) - 1
    state = {}
    for name, value in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = _renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), IN_AN_ATTENTION)
            value = value[..., None, None] if value.ndim == 2 else value  # 1x1 convolutions there
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        state[prefix + name] = value
    return state


def of_clip(text_encoder: nn.Module, prefix: str = "cond_stage_model.") -> dict[str, Tensor]:
    state = text_encoder.state_dict().items()
    return {f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": value for name, value in state}


def of_open_clip(text_encoder: nn.Module, prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    state = {name.removeprefix("text_model."): value for name, value in text_encoder.state_dict().items()}
    result = {}
    for name, value in state.items():
        if "self_attn.q_proj" in name:
            all_three = [state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"]
            layer, kind = re.match(r"encoder\.layers\.(\d+)\..*\.(weight|bias)", name).groups()
            result[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(all_three)
        elif name == "text_projection.weight":
            result[f"{prefix}text_projection"] = value.T.contiguous()
        elif not re.search(r"self_attn\.[kv]_proj", name):
            result[prefix + _renamed(name, IN_OPEN_CLIP)] = value
    return result


def _with_unused_layer(state: dict[str, Tensor], layers: int, width: int) -> dict[str, Tensor]:
    """Stable Diffusion 2's files hold the whole OpenCLIP, of which it leaves the last layer and the projection unused."""
    prefix = "cond_stage_model.model.transformer.resblocks."
    last = {n: v for n, v in state.items() if n.startswith(f"{prefix}{layers - 1}.")}
    state |= {
        name.replace(f"resblocks.{layers - 1}.", f"resblocks.{layers}."): value + 1 for name, value in last.items()
    }
    one = next(iter(last.values()))
    return state | {"cond_stage_model.model.text_projection": torch.eye(width, dtype=one.dtype, device=one.device)}


def single_file(pipe: Any, layout: str) -> dict[str, Tensor]:
    """All tensors of a pipeline, contiguous; layout sd15, sd21 or sdxl."""
    state = of_unet(pipe.unet) | of_vae(pipe.vae)
    if layout == "sd15":
        state |= of_clip(pipe.text_encoder)
    elif layout == "sd21":
        config = pipe.text_encoder.config
        state |= _with_unused_layer(of_open_clip(pipe.text_encoder), config.num_hidden_layers, config.hidden_size)
    else:
        state |= of_clip(pipe.text_encoder, "conditioner.embedders.0.")
        state |= of_open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {name: value.detach().contiguous() for name, value in state.items()}
