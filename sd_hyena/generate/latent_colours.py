"""What latents look like, without the VAE: the linear map to colours that comes nearest to it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sd_hyena.models.latents import decoded

CELLS = 16  # a side of what the map is fitted on
SAMPLES = 8  # of noise, and as many of one colour


@torch.no_grad()
def fitted(pipe: Any) -> Tensor:
    """(C + 1, 3): colours in 0 ... 1 from a cell's C latents and a one, by least squares on this pipeline's VAE."""
    channels = pipe.vae.config.latent_channels
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(SAMPLES, channels, CELLS, CELLS, generator=source)
    noise = F.avg_pool2d(F.pad(noise, (1, 1, 1, 1), mode="circular"), 3, stride=1) * 3
    flat = torch.randn(SAMPLES, channels, 1, 1, generator=source).expand(-1, -1, CELLS, CELLS)
    latents = torch.cat([noise, flat])
    images = torch.stack([torch.from_numpy(decoded(pipe, x[None].to(pipe.vae.device))) for x in latents])
    colours = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, (CELLS, CELLS))
    return torch.linalg.lstsq(_with_ones(latents), colours.permute(0, 2, 3, 1).flatten(0, 2)).solution


def coloured(latents: Tensor, colours: Tensor) -> Image.Image:
    """Latents (C, h, w), noisy ones too, as a picture of one pixel a cell."""
    latents = latents.detach().float().cpu()
    latents = latents / latents.std().clamp(min=1)
    pixels = _with_ones(latents[None]) @ colours
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().unflatten(0, latents.shape[-2:]).numpy())


def _with_ones(latents: Tensor) -> Tensor:
    """(B, C, h, w) as rows (B h w, C + 1)."""
    return F.pad(latents.permute(0, 2, 3, 1).flatten(0, 2), (0, 1), value=1.0)
