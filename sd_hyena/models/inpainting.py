"""Painting in masks: UNets that are told of them, also where no picture is given, and the picture around the mask.

The nine channels of such a UNet are the latents, a mask, and the latents of the picture under the mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sd_hyena.large.float32 import in_float32

CHANNELS = 9
SOFT = 4  # pixels inside a mask's border over which the old picture becomes the new one
BLANK = 256  # pixels a side of the picture that stands for any blank one


def is_inpainting(unet: nn.Module) -> bool:
    return unet.conv_in.in_channels == CHANNELS


@torch.no_grad()
def complete_inputs(pipe: Any) -> None:
    """Let the UNet take four channels too, as training, evaluation and pictures from nothing give them.

    It goes by the name of a UNet of four channels; within `painting_masks` it has its own again. The
    blank picture is the middle of an encoded one, everywhere: without a border it is of any size.
    """
    with in_float32(pipe.vae.encoder, pipe.vae.quant_conv):  # SDXL's overflows in half precision
        latents = pipe.vae.encode(torch.zeros(1, 3, BLANK, BLANK, device=pipe.vae.device)).latent_dist.mean
    latents = latents * pipe.vae.config.scaling_factor
    height, width = latents.shape[-2:]
    middle = latents[:, :, height // 2, width // 2, None, None]
    rest = torch.cat([torch.ones_like(middle[:, :1]), middle], dim=1).to(pipe.unet.dtype)
    pipe.unet.register_buffer("blank", rest, persistent=False)
    pipe.unet.register_forward_pre_hook(_completed, with_kwargs=True)
    pipe.unet.register_to_config(in_channels=4)


@contextmanager
def painting_masks(unet: nn.Module) -> Iterator[None]:
    """Within the block, for pipelines that give mask and masked picture themselves. Other UNets stay as they are."""
    before = unet.config.in_channels
    if is_inpainting(unet):
        unet.register_to_config(in_channels=CHANNELS)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=before)


def _completed(unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if args:
        return (_nine(unet, args[0]), *args[1:]), kwargs
    return args, kwargs | {"sample": _nine(unet, kwargs["sample"])}


def _nine(unet: nn.Module, sample: Tensor) -> Tensor:
    if sample.shape[1] == CHANNELS:
        return sample
    return torch.cat([sample, unet.blank.to(sample).expand(len(sample), -1, *sample.shape[-2:])], dim=1)


def repainted(old: Image.Image, new: np.ndarray, mask: Image.Image) -> np.ndarray:
    """The old picture, bit for bit where the mask, white or black, is black, and the new one (H, W, 3) in it."""
    from scipy.ndimage import distance_transform_edt

    inside = np.asarray(mask) > 0
    weight = (distance_transform_edt(inside) / SOFT).clip(0, 1)[..., None] if not inside.all() else 1.0
    before = np.asarray(old).astype(np.float64)
    return (before + weight * (new - before)).round().astype(np.uint8)
