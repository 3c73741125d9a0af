"""What latents look like, without the VAE: the linear map to colours that comes nearest to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sd_hyena.large.float32 import in_float32
from sd_hyena.models.latents import encoded

CELLS, SAMPLES = 16, 8  # a side of the pictures that the map is fitted on; of one colour, and of random patches


@torch.no_grad()
def fitted(pipe: Any) -> Tensor:
    """(C + 1, 3): colours in -1 ... 1 from a cell's C latents and a one, by least squares on this pipeline's own VAE."""
    source = torch.Generator().manual_seed(0)
    scale = pipe.vae_scale_factor
    colours = torch.cat([
        (2 * torch.rand(SAMPLES, 3, side, side, generator=source) - 1).repeat_interleave(n, 2).repeat_interleave(n, 3)
        for side, n in ((1, CELLS), (CELLS // 4, 4))
    ])  # fmt: skip
    with in_float32(pipe.vae.encoder, pipe.vae.quant_conv):  # SDXL's overflows in half precision
        pictures = colours.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        latents = torch.cat([encoded(pipe, one[None], torch.float32).cpu() for one in pictures])
    return torch.linalg.lstsq(_with_ones(latents), colours.permute(0, 2, 3, 1).flatten(0, 2)).solution


def coloured(latents: Tensor, colours: Tensor) -> Image.Image:
    """Latents (C, h, w), noisy ones too, as a picture of one pixel a cell."""
    pixels = _with_ones(latents.detach().float().cpu()[None]) @ colours
    pixels = (pixels.clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().unflatten(0, latents.shape[-2:]).numpy())


def _with_ones(latents: Tensor) -> Tensor:
    """(B, C, h, w) as rows (B h w, C + 1)."""
    return F.pad(latents.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
