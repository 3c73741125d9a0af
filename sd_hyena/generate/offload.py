"""Where a pipeline's weights wait while they are not needed: in the computer's memory instead of the GPU's."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sd_hyena.errors import BadInput


def check_offload(mode: str, device: torch.device) -> None:
    """Raise BadInput where there is no second memory."""
    if mode != "off" and device.type == "cpu":
        raise BadInput(f"offload={mode} moves weights between a GPU and the computer's memory; device={device} has one")


def offload(pipe: Any, mode: str, device: torch.device) -> None:
    """From now on the pipeline computes on `device`, its weights on the CPU as `mode` says.

    model: whole networks take turns. group: single layers, by diffusers; sequential: likewise, by accelerate. There the
    VAE stays on the device: it works in tiles, layer by layer, many times.
    """
    if mode == "model":
        _in_turns(pipe, device)
    elif mode == "group":
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", exclude_modules=["vae"])
    else:
        pipe._exclude_from_cpu_offload = [*pipe._exclude_from_cpu_offload, "vae"]
        pipe.enable_sequential_cpu_offload(device=device)


def _in_turns(pipe: Any, device: torch.device) -> None:
    """As `enable_model_cpu_offload`, which takes its hooks off and puts them on again after every picture: what stands
    around the UNet's forward meanwhile (tiles, for one) would be lost."""
    from accelerate import cpu_offload_with_hook

    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    turns = [parts.pop(name) for name in pipe.model_cpu_offload_seq.split("->") if name in parts]
    hooks: list[Any] = []
    for part in turns:
        hooks.append(cpu_offload_with_hook(part, device, prev_module_hook=hooks[-1] if hooks else None)[1])
    hooks[0].hook.prev_module_hook = hooks[-1]
    for part in parts.values():  # a ControlNet works in every step
        part.to(device)
