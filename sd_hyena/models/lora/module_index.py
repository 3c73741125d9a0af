"""The modules of a pipeline's networks by all names that files give them, flat (tensor_names.py)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from sd_hyena.models.lora.tensor_names import flat

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
IN_THE_UNET = {  # as the original Stable Diffusion calls what stands outside its numbered blocks
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
NUMBERED = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def networks_of(pipe: Any) -> dict[str, nn.Module]:
    return {name: network for name in NETWORKS if (network := getattr(pipe, name, None)) is not None}


def modules_of(network: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Path and module, by flat name, of all modules that have a weight."""
    found = {}
    for path, module in network.named_modules():
        if isinstance(getattr(module, "weight", None), nn.Parameter):
            path = path.removesuffix(".base_layer")  # within a LoRA of PEFT's
            for name in (path, *_original(network, path)):
                found[flat(name)] = path, module
    return found


def _original(network: nn.Module, path: str) -> Iterator[str]:
    """What the original Stable Diffusion calls a module of a UNet, if this is one."""
    if not hasattr(network, "down_blocks"):
        return
    if path in IN_THE_UNET:
        yield IN_THE_UNET[path]
    elif match := MIDDLE.fullmatch(path):
        part, number, rest = match.groups()
        yield f"middle_block.{1 if part == 'attentions' else 2 * int(number)}.{IN_A_RESNET.get(rest, rest)}"
    elif match := NUMBERED.fullmatch(path):
        side, block, part, number, rest = match.groups()
        each = network.config.layers_per_block + 1
        within = each - 1 if part.endswith("samplers") else int(number)
        index = int(block) * each + within + (side == "down")
        inner = {"resnets": 0, "attentions": 1, "downsamplers": 0}.get(part)
        if part == "upsamplers":
            inner = 2 if hasattr(network.up_blocks[int(block)], "attentions") else 1
        rest = "op" if part == "downsamplers" else IN_A_RESNET.get(rest, rest)
        yield f"{'input' if side == 'down' else 'output'}_blocks.{index}.{inner}.{rest}"
