"""DiffuseHigh (Kim et al. 2024): a picture drawn again, larger, whose low wavelet band is held to it for the first steps."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.float32 import finite
from sd_hyena.large.growing.wavelet import low_band
from sd_hyena.large.noise_levels import levels


@dataclass(frozen=True, kw_only=True)
class DiffuseHigh:
    """How a picture is held. Raises BadInput.

    steps: the first denoising steps, which are held.
    levels: of the wavelet transform; the band that is held has a 2 ** levels-th of the resolution.
    moments: of Daubechies' wavelet; 4 is db4.
    alpha: how much the picture is sharpened before anything else; 0 leaves it as it is.
    circular: band and sharpening go round the picture's borders.
    """

    steps: int = 5
    levels: int = 1
    moments: int = 4
    alpha: float = 1.0
    circular: bool = False

    def __post_init__(self):
        if not 0 <= self.alpha <= 10:
            raise BadInput(f"alpha={self.alpha!r} of diffusehigh must be from 0 to 10; 1 is usual")
        for name, (low, high) in {"steps": (0, 1000), "levels": (1, 6), "moments": (1, 10)}.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise BadInput(f"{name}={value!r} of diffusehigh must be a whole number from {low} to {high}")


@contextmanager
def diffusehigh(pipe: Any, **options) -> Iterator[DiffuseHigh]:
    """Within the block, an img2img pipeline holds what it draws to its picture; `options` are DiffuseHigh's fields.

    In each of the first steps the clean picture that the prediction foresees is decoded, its low band replaced by the
    picture's, and encoded again; the sampler, whichever it is, then steps towards that. The picture is given enlarged;
    as published it is `sharpened` first; the noising steps are the call's strength (15 of 50 are .3). Raises BadInput for
    options that cannot work and a pipeline that starts from no picture; the call raises it for latents as the picture.
    """
    settings = DiffuseHigh(**options)
    if "image" not in inspect.signature(pipe.prepare_latents).parameters:
        raise BadInput(f"diffusehigh needs a picture to start from, and {type(pipe).__name__} takes none")
    held = _Held(pipe, settings)
    ours = functools.update_wrapper(functools.partial(held.prepare_latents), pipe.prepare_latents)
    step = functools.update_wrapper(functools.partial(held.step), pipe.scheduler.step)
    with replaced(pipe, "prepare_latents", ours), replaced(pipe.scheduler, "step", step):
        yield settings


class _Held:
    """Stands in for the scheduler's step."""

    def __init__(self, pipe: Any, settings: DiffuseHigh):
        self._pipe, self._settings = pipe, settings
        self._prepare, self._step = pipe.prepare_latents, pipe.scheduler.step
        self._signature = inspect.signature(pipe.prepare_latents)
        self._picture: Tensor | None = None
        self._taken = 0

    def prepare_latents(self, *args, **kwargs) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        picture = bound.arguments["image"]
        if picture.shape[1] != 3:
            raise BadInput("diffusehigh needs the picture itself, not its latents")
        picture = sharpened(picture, self._settings.alpha, circular=self._settings.circular)
        self._picture, self._taken = picture, 0
        bound.arguments["image"] = picture
        return self._prepare(*bound.args, **bound.kwargs)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args, **kwargs) -> Any:
        """The scheduler's."""
        if self._taken < self._settings.steps:
            model_output = self._towards(model_output, timestep, sample)
        self._taken += 1
        return self._step(model_output, timestep, sample, *args, **kwargs)

    @torch.no_grad()
    def _towards(self, prediction: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The prediction that foresees the held picture, (B, 4, h, w)."""
        scheduler = self._pipe.scheduler
        signal, noise = levels(scheduler, torch.as_tensor(timestep, device=sample.device).reshape(1))
        kind = scheduler.config.prediction_type
        return told(self._held(foreseen(prediction.float(), sample.float(), signal, noise, kind)), sample.float(),
                    signal, noise, kind).to(prediction.dtype)  # fmt: skip

    def _held(self, latents: Tensor) -> Tensor:
        """Clean latents (B, 4, h, w) with the low band of the picture, one picture at a time."""
        vae, settings = self._pipe.vae, self._settings
        found = []
        for i, one in enumerate(latents):
            drawn = finite(
                one[None] / vae.config.scaling_factor, vae, lambda x: vae.decode(x).sample, "decoder", "post_quant_conv"
            )
            picture = self._picture[i % len(self._picture)][None].to(drawn)
            drawn = drawn + low_band(picture - drawn, settings.levels, settings.moments, settings.circular)
            encode = lambda x: vae.encode(x).latent_dist.mean
            found.append(finite(drawn.clamp(-1, 1), vae, encode, "encoder", "quant_conv"))
        return torch.cat(found) * vae.config.scaling_factor


def foreseen(prediction: Tensor, sample: Tensor, signal: Tensor, noise: Tensor, kind: str) -> Tensor:
    """The clean latents that a prediction means, where sample = signal · clean + noise · epsilon."""
    if kind == "sample":
        return prediction
    if kind == "epsilon":
        return (sample - noise * prediction) / signal
    norm = (signal**2 + noise**2).sqrt()
    return (signal * sample / norm - noise * prediction) / norm


def told(clean: Tensor, sample: Tensor, signal: Tensor, noise: Tensor, kind: str) -> Tensor:
    """The prediction that means these clean latents: the inverse of `foreseen`."""
    if kind == "sample":
        return clean
    if kind == "epsilon":
        return (sample - signal * clean) / noise
    norm = (signal**2 + noise**2).sqrt()
    return (signal * sample / norm - norm * clean) / noise


def sharpened(picture: Tensor, alpha: float = 1.0, sigma: float = 1.0, circular: bool = False) -> Tensor:
    """A picture (B, 3, H, W) in -1 ... 1 with `alpha` times what a Gaussian of `sigma` px takes away added to it."""
    if not alpha:
        return picture
    reach = math.ceil(4 * sigma)
    i = torch.arange(-reach, reach + 1, device=picture.device, dtype=torch.float32)
    kernel = torch.exp(-(i**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(picture.shape[1], 1, -1)
    x, mode = picture.float(), "circular" if circular else "replicate"
    soft = F.conv2d(F.pad(x, (0, 0, reach, reach), mode), kernel[..., None], groups=x.shape[1])
    soft = F.conv2d(F.pad(soft, (reach, reach, 0, 0), mode), kernel[:, :, None], groups=x.shape[1])
    return (x + alpha * (x - soft)).clamp(-1, 1).to(picture)
