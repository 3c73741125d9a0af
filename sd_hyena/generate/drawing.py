"""From a pipeline and a config to pixels; image n comes from seed + n alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sd_hyena.large.float32 import in_float32
from sd_hyena.large.tiled_vae import tiled_vae
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.ranks import say

SMALLER = ({"decoder_tile_size": 64}, {"decoder_tile_size": 32, "offload": "disk"})  # when the VAE's memory runs out


def draw(
    pipe: Any, config: GenerateConfig, given: dict[str, Any], rows: Sequence[int], bar: Any = None
) -> list[np.ndarray]:
    """Images number `rows`, uint8 (H, W, 3); `given` is what the pipeline's call needs for its task.

    Raises FloatingPointError if an image is not finite.
    """

    def advance(_pipe, _step, _timestep, tensors):
        if bar is not None:
            bar.update(len(rows))
        return tensors

    latents = pipe(
        config.prompt,
        negative_prompt=config.negative_prompt,
        **given,
        num_images_per_prompt=len(rows),
        num_inference_steps=config.steps,
        guidance_scale=config.cfg_scale,
        generator=[torch.Generator().manual_seed((config.seed + n) % 2**32) for n in rows],
        output_type="latent",
        callback_on_step_end=advance,
    ).images
    return [decoded(pipe, x[None]) for x in latents]


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor) -> np.ndarray:
    """Latents (1, 4, h, w) as an image, uint8 (H, W, 3). NaN is decoded again in float32, and what does not fit in tiles.

    Raises FloatingPointError if latents or image are not finite.
    """
    if not latents.isfinite().all():
        raise FloatingPointError("the latents are not finite; try --dtype float32 or bfloat16")
    latents = latents / pipe.vae.config.scaling_factor
    image = _decode(pipe.vae, latents.to(pipe.vae.dtype))
    if not image.isfinite().all():
        with in_float32(pipe.vae.decoder, pipe.vae.post_quant_conv):
            image = _decode(pipe.vae, latents.float())
        if not image.isfinite().all():
            raise FloatingPointError("the VAE gives NaN even in float32; this VAE is damaged")
    pixels = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    try:
        return vae.decode(latents).sample
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    for options in SMALLER:
        release()
        say(f"out of memory: decoding in tiles of {options['decoder_tile_size']} cells")
        try:
            with tiled_vae(vae, **options):
                return vae.decode(latents).sample
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    raise failure
