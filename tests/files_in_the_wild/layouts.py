"""Small files of the shipped model in the forms in which other programs leave theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_hyena.options.shipped import SHIPPED_MODEL
from tests import ldm

UNET = "model.diffusion_model."
LAYER = f"{UNET}input_blocks.1.1.proj_in.weight"
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def whole(pipe: Any, layout: str = "sd15") -> dict[str, Tensor]:
    """The tensors of a single file in the original layout."""
    return {name: value.clone() for name, value in ldm.single_file(pipe, layout).items()}


def saved(path: Path, tensors: dict[str, Tensor], config: Path = SHIPPED_MODEL) -> Path:
    """A file, in the form that its name says, with its configuration beside it."""
    shutil.copytree(config, path.with_suffix(""), ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    if path.suffix.lower() in (".safetensors", ".sft"):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def before_zip(content: Any, path: Path) -> Path:
    """What torch before 1.6 wrote."""
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def cast(tensors: dict[str, Tensor], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors below a prefix in another precision."""
    return {name: value.to(dtype) if name.startswith(prefix) else value for name, value in tensors.items()}


def scaled(
    tensors: dict[str, Tensor], newer: bool, by_row: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """ComfyUI's scaled float8 of the UNet's matrices, in its older or newer names; and the numbers that they stand for."""
    file, truth = dict(tensors), dict(tensors)
    names = [n for n in tensors if n.startswith(UNET) and n.endswith(".weight") and tensors[n].ndim == 2]
    for name in names:
        weight, layer = tensors[name].float(), name.removesuffix("weight")
        scale = weight.abs().amax(dim=1) / 448 if by_row else weight.abs().max() / 448
        shaped = scale[:, None] if by_row else scale
        file[name] = (weight / shaped).to(torch.float8_e4m3fn)
        truth[name] = file[name].float() * shaped
        file |= {f"{layer}weight_scale" if newer else f"{layer}scale_weight": scale}
        file |= {f"{layer}input_scale" if newer else f"{layer}scale_input": torch.ones(())}
        if newer:
            said = json.dumps({"format": "float8_e4m3fn"}).encode()
            file[f"{layer}comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if not newer:
        file[f"{UNET}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    return file, truth


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The UNet as the original training code names its average: without dots, and nothing else of it."""
    short = lambda name: "model_ema." + name.removeprefix("model.").replace(".", "")
    file = {short(name) if name.startswith(UNET) else name: value for name, value in tensors.items()}
    return file | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}


def renamed(tensors: dict[str, Tensor], *prefixes: tuple[str, str]) -> dict[str, Tensor]:
    """Tensors whose names begin otherwise."""
    for old, new in prefixes:
        tensors = {new + n.removeprefix(old) if n.startswith(old) else n: v for n, v in tensors.items()}
    return tensors
