"""ComfyUI's own VAE, tile by tile, with the answer of the untiled one.

B batch, (H, W) pixels, (h, w) latent cells of 8 pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.large.float32 import in_float32
from sd_hyena.large.steps import Step
from sd_hyena.large.tile_sizes import default_tile_size
from sd_hyena.large.tile_store import TileStore
from sd_hyena.large.tiled_network import NotFinite, TiledNetwork

from . import engine
from .vae_steps import decoder_steps, encoder_steps

CELL = 8  # pixels


def decode(vae: Any, latents: Tensor, tile: int = 0) -> Tensor:
    """(B, 4, h, w) -> (B, H, W, 3) from 0 to 1, by tiles of so many pixels; 0 as the memory allows. Raises BadInput."""
    model = _model(vae, latents)
    steps, parts = decoder_steps(model), (model.decoder, getattr(model, "post_quant_conv", None))
    cells = tile // CELL or default_tile_size("decoder", vae.device)
    engine.load_vae(vae, vae.memory_used_decode((1, latents.shape[1], cells, cells), vae.vae_dtype))
    images = [vae.process_output(y) for y in _each(vae, steps, parts, cells, latents)]
    return torch.cat(images).movedim(1, -1)


def encode(vae: Any, pixels: Tensor, tile: int = 0) -> Tensor:
    """(B, H, W, 3) from 0 to 1 -> (B, 4, h, w), by tiles of so many pixels; 0 as the memory allows. Raises BadInput."""
    x = vae.vae_encode_crop_pixels(pixels[..., :3]).movedim(-1, 1)
    model = _model(vae, x)
    steps, parts = encoder_steps(model), (model.encoder, getattr(model, "quant_conv", None))
    tile = tile or default_tile_size("encoder", vae.device)
    engine.load_vae(vae, vae.memory_used_encode((1, 3, tile, tile), vae.vae_dtype))
    moments = _each(vae, steps, parts, tile, vae.process_input(x))
    return torch.cat([model.regularization(y)[0] for y in moments])


def _model(vae: Any, x: Tensor) -> torch.nn.Module:
    vae.throw_exception_if_invalid()
    if x.ndim != 4:
        raise BadInput(f"latents or images of shape {tuple(x.shape)} are no pictures; exact tiles are for pictures")
    return vae.first_stage_model


def _each(vae: Any, steps: Sequence[Step], parts: Sequence[Any], tile: int, x: Tensor) -> list[Tensor]:
    """Each of a batch by itself, in float32 on ComfyUI's device for results."""
    progress = engine.Progress()

    def all_told(done: int, total: int, before: int) -> None:
        progress(done + before * total, total * len(x))

    results = []
    for number, one in enumerate(x.split(1)):
        network = TiledNetwork(
            steps, tile, TileStore("cpu", vae.device), progress=lambda *of, number=number: all_told(*of, number)
        )
        one = one.to(vae.device, vae.vae_dtype)
        results.append(_finite(network, parts, one).to(vae.output_device).float())
    return results


def _finite(network: TiledNetwork, parts: Sequence[Any], x: Tensor) -> Tensor:
    """What overflows in half precision is computed again in float32."""
    try:
        y = network(x)
        if x.dtype.itemsize >= 4 or y.isfinite().all():
            return y
    except NotFinite:
        pass
    logging.warning("Hyena: the VAE overflows in %s; it computes this once more in float32", x.dtype)
    with in_float32(*parts):
        return network(x.float())
