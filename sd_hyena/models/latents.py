"""Pictures into latents and back, whatever their size and whatever memory there is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.large.float32 import finite
from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_vae import tiled_vae
from sd_hyena.options.effect import TILED_VAE_FROM
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.ranks import say

SMALLER = {  # when the VAE's memory runs out
    "encoder": ({"encoder_tile_size": 512}, {"encoder_tile_size": 256, "offload": "disk"}),
    "decoder": ({"decoder_tile_size": 64}, {"decoder_tile_size": 32, "offload": "disk"}),
}
DOING = {"encoder": "encoding in tiles of {} pixels", "decoder": "decoding in tiles of {} cells"}


def vae_for(pipe: Any, side: int) -> AbstractContextManager:
    """Within the block the VAE works in tiles, exactly, if the longer side, in pixels, asks for it."""
    return tiled_vae(pipe.vae) if side > TILED_VAE_FROM else nullcontext()


@torch.no_grad()
def resized(pipe: Any, latents: Tensor, width: int, height: int) -> Tensor:
    """Latents (1, 4, h, w) of the same picture at another size in pixels."""
    if latents.shape[-2:] == (height // 8, width // 8):
        return latents
    with vae_for(pipe, 8 * max(latents.shape[-2:])):
        image = _decode(pipe.vae, latents / pipe.vae.config.scaling_factor, None)
    image = F.interpolate(image.float(), (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    return encoded(pipe, image)


@torch.no_grad()
def encoded(pipe: Any, image: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Scaled latents of an image (1, 3, H, W) in -1 ... 1; `dtype` is what the encoder computes in, if not the VAE's."""
    image = image.to(pipe.vae.device, dtype or pipe.vae.dtype)
    with vae_for(pipe, max(image.shape[-2:])):
        latents = _in_memory(pipe.vae, lambda: pipe.vae.encode(image).latent_dist.mean, "encoder", None)
    return latents * pipe.vae.config.scaling_factor


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor, progress: Progress | None = None) -> np.ndarray:
    """Latents (1, 4, h, w) as an image, uint8 (H, W, 3). NaN is decoded again in float32, and what does not fit in tiles.

    `progress` is told of the tiles that memory makes necessary. Raises FloatingPointError if latents or image are not finite.
    """
    if not latents.isfinite().all():
        raise FloatingPointError("the latents are not finite; try --dtype float32 or bfloat16")
    latents = latents / pipe.vae.config.scaling_factor
    image = finite(latents, pipe.vae, lambda x: _decode(pipe.vae, x, progress), "decoder", "post_quant_conv")
    if not image.isfinite().all():
        raise FloatingPointError("the VAE gives NaN even in float32; this VAE is damaged")
    pixels = ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def _decode(vae: nn.Module, latents: Tensor, progress: Progress | None) -> Tensor:
    return _in_memory(vae, lambda: vae.decode(latents).sample, "decoder", progress)


def _in_memory(vae: nn.Module, call: Callable[[], Tensor], side: str, progress: Progress | None) -> Tensor:
    """The VAE's answer; after an out-of-memory in tiles."""
    try:
        return call()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    for options in SMALLER[side]:
        release()
        say(f"out of memory: {DOING[side].format(options[f'{side}_tile_size'])}")
        try:
            with tiled_vae(vae, **options, progress=progress):
                return call()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise failure
