"""From a pipeline and a config to pixels; image n comes from seed + n alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sd_hyena.generate.watch import Advance
from sd_hyena.models.inpainting import repainted
from sd_hyena.models.latents import decoded
from sd_hyena.options.generate_config import GenerateConfig


class Picture(NamedTuple):
    """Pixels, uint8 (H, W, 3), and the scaled latents (1, 4, H/8, W/8) that they were decoded from."""

    pixels: np.ndarray
    latents: Tensor


def denoising_steps(config: GenerateConfig) -> int:
    """How many of its steps are taken: of a picture that is drawn again, the last ones."""
    return int(config.steps * config.strength) if config.init_image else config.steps


def steps_of_image(config: GenerateConfig) -> int:
    """What one image counts for: the noise inversion's steps, the denoising steps, and one for the VAE."""
    return config.noise_inversion + denoising_steps(config) + 1


def draw(
    pipe: Any, config: GenerateConfig, given: dict[str, Any], rows: Sequence[int], advance: Advance
) -> list[Picture]:
    """Images number `rows`; `given` is what the pipeline's call needs for its task.

    Raises FloatingPointError if an image is not finite, Cancelled where the watch says so.
    """
    start, n, steps = advance.done, len(rows), denoising_steps(config)
    inverted = start + n * config.noise_inversion
    advance.worth = n

    def after_step(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        advance.worth = n * steps / pipe.num_timesteps
        advance.to(inverted + (step + 1) * advance.worth, tensors["latents"])
        return tensors

    latents = pipe(
        config.prompt,
        negative_prompt=config.negative_prompt,
        **given,
        num_images_per_prompt=n,
        num_inference_steps=config.steps,
        guidance_scale=config.cfg_scale,
        generator=[torch.Generator().manual_seed((config.seed + row) % 2**32) for row in rows],
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    images, advance.worth = [], 1.0
    for i, x in enumerate(latents):
        image = decoded(pipe, x[None], advance.within)
        image = repainted(given["image"], image, given["mask_image"]) if "mask_image" in given else image
        images.append(Picture(image, x[None]))
        advance.to(inverted + n * steps + i + 1)
    return images
