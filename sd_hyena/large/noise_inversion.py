"""Noise inversion: img2img that starts from the noise which the picture itself would have come from.

After Tiled Diffusion (pkuliyi2015, 2023). The sampler's ODE is followed from the picture backwards to the level of noise
at which the pipeline starts; where the picture is smooth, fresh noise is mixed in, so that detail can be drawn there.

B batch, C channels, (H, W) pixels, (h, w) latent cells. sigma: deviation of the noise over that of the picture.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.noise_levels import levels
from sd_hyena.large.progress import Progress, bar

EPS = 0.01  # of the guided filter: contrast below its root, .1 of black to white, is texture
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class NoiseInversion:
    """How the noise is found. Raises BadInput.

    steps: of the way back, one evaluation of the UNet each, with the prompt alone.
    retouch: the UNet is told an earlier timestep, t / retouch; above 1 smooths (2 or 3 for drawings).
    renoise_strength: how much fresh noise takes the place of the found one where the picture is smooth; 0 none.
    renoise_kernel: radius, in pixels, over which the picture is called smooth.
    circular: the picture goes on at its opposite sides.
    progress: told of each step; None shows a bar.
    """

    steps: int = 10
    retouch: float = 1.0
    renoise_strength: float = 1.0
    renoise_kernel: int = 64
    circular: bool = False
    progress: Progress | None = None

    def __post_init__(self):
        limits = {"steps": (1, 1000), "retouch": (1, 100), "renoise_strength": (0, 2), "renoise_kernel": (1, 4096)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            whole = name in ("steps", "renoise_kernel")
            if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
                kind = "whole number" if whole else "number"
                raise BadInput(f"{name}={value!r} of the noise inversion must be a {kind} from {low} to {high}")


@contextmanager
def noise_inversion(pipe: Any, **options) -> Iterator[NoiseInversion]:
    """Within the block, an img2img or inpainting pipeline starts from its picture's own noise; `options` are
    NoiseInversion's fields.

    For any scheduler. Entered before `tiled_diffusion`, the way back is tiled and regional too; a ControlNet has no part
    in it. A picture that starts from noise alone (strength 1 of an inpainting) is drawn as ever. Raises BadInput for
    options that cannot work and for a pipeline that starts from no picture; the pipeline's call raises it for latents
    given as the picture.
    """
    settings = NoiseInversion(**options)
    if "image" not in inspect.signature(pipe.prepare_latents).parameters:
        raise BadInput(f"noise inversion needs a picture to start from, and {type(pipe).__name__} takes none")
    start = _Start(pipe, settings)
    with ExitStack() as stack:
        for owner, name in ((pipe, "encode_prompt"), (pipe, "prepare_latents"), (pipe.scheduler, "add_noise")):
            ours = functools.update_wrapper(functools.partial(getattr(start, name)), getattr(owner, name))
            stack.enter_context(replaced(owner, name, ours))
        yield settings


class _Start:
    """Stands in for what a pipeline does between its prompt and its first noisy latents."""

    def __init__(self, pipe: Any, settings: NoiseInversion):
        self._pipe, self._settings = pipe, settings
        self._encode, self._prepare, self._add = pipe.encode_prompt, pipe.prepare_latents, pipe.scheduler.add_noise
        self._signature = inspect.signature(pipe.prepare_latents)
        self._text: tuple[Tensor | None, ...] = ()
        self._picture: Tensor | None = None  # while latents are prepared
        self._found: tuple[Tensor, Tensor] | None = None  # the pipeline's noise, and ours in its place

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        self._text = self._encode(*args, **kwargs)
        return self._text

    def prepare_latents(self, *args, **kwargs) -> Any:
        self._picture, self._found = self._signature.bind(*args, **kwargs).arguments.get("image"), None
        try:
            return self._prepare(*args, **kwargs)
        finally:
            self._picture = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The scheduler's, with the picture's own noise; an inpainting adds the same again in every step."""
        if self._picture is not None:
            self._found = noise, self._mixed(original_samples, noise, timesteps)
        if self._found is not None and torch.equal(noise, self._found[0]):
            noise = self._found[1]
        return self._add(original_samples, noise, timesteps)

    @torch.no_grad()
    def _mixed(self, latents: Tensor, fresh: Tensor, timesteps: Tensor) -> Tensor:
        """The found noise with fresh noise where the picture is smooth, (B, C, h, w)."""
        if self._picture.shape[1] != 3:
            raise BadInput("noise inversion needs the picture itself, not its latents")
        settings, schedule = self._settings, self._pipe.scheduler.alphas_cumprod.double().cpu()
        signal, noise_there = levels(self._pipe.scheduler, timesteps[:1])
        sigma = noise_there / signal
        sigmas = ((1 - schedule) / schedule).sqrt().numpy()
        with bar(settings.steps, "step of the noise inversion", settings.progress) as tell:
            noise = inverted(self._epsilon, latents, sigma.item(), sigmas, settings.steps, settings.retouch, tell)
        texture = detail(self._picture.float(), settings.renoise_kernel, settings.circular)
        smooth = 1 - F.adaptive_avg_pool2d(texture, latents.shape[2:])
        share = (settings.renoise_strength * smooth).clamp(0, 1).to(fresh).repeat(len(fresh) // len(smooth), 1, 1, 1)
        return ((1 - share) * noise + share * fresh) / (share**2 + (1 - share) ** 2).sqrt()

    def _epsilon(self, x: Tensor, sigma: float, timestep: float) -> Tensor:
        """The noise that the UNet sees in x, which is picture + sigma · noise, (B, C, h, w)."""
        text, unet, scale = self._text[0], self._pipe.unet, (sigma**2 + 1) ** -0.5
        arguments = {"encoder_hidden_states": text, "return_dict": False}
        if unet.config.addition_embed_type == "text_time":
            arguments["added_cond_kwargs"] = {"text_embeds": self._text[2], "time_ids": self._time_ids(x)}
        z, t = scale * x, torch.tensor(timestep, device=x.device, dtype=torch.float32)
        prediction = unet(z.to(text.dtype), t, **arguments)[0].to(x.dtype)
        kind = self._pipe.scheduler.config.prediction_type
        if kind == "v_prediction":
            return scale * (prediction + sigma * z)
        return prediction if kind == "epsilon" else (x - prediction) / sigma

    def _time_ids(self, x: Tensor) -> Tensor:
        """SDXL's sizes of an uncropped picture; of its refiner, the aesthetic score 6 instead of the last."""
        size = tuple(self._picture.shape[-2:])
        last = (6,) if self._pipe.config.get("requires_aesthetics_score") else size
        return torch.tensor([[*size, 0, 0, *last]]).to(x).repeat(len(x), 1)


def inverted(
    epsilon: Callable[[Tensor, float, float], Tensor],
    x: Tensor,
    sigma: float,
    sigmas: np.ndarray,
    steps: int,
    retouch: float = 1.0,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """The noise (B, C, h, w) that takes a picture's latents x to level `sigma` along the sampler's ODE.

    epsilon(x, sigma, timestep) is the noise seen in x; `sigmas` are those of all timesteps. Euler's method over evenly
    spaced timesteps, with the noise seen at the level that a step goes to.
    """
    numbers, logs = np.arange(len(sigmas)), np.log(sigmas)
    last = np.interp(np.log(sigma), logs, numbers)
    noisy, before = x.float(), 0.0
    for i in range(1, steps + 1):
        timestep = float(last * i / steps)
        level = float(np.exp(np.interp(timestep, numbers, logs))) if i < steps else sigma
        noisy = noisy + (level - before) * epsilon(noisy, level, timestep / retouch)
        before = level
        progress(i, steps)
    return ((noisy - x.float()) / sigma).to(x.dtype)


def detail(picture: Tensor, radius: int, circular: bool = False) -> Tensor:
    """How much texture a picture (B, 3, H, W) in [-1, 1] has at each pixel, (B, 1, H, W) in 0 ... 1.

    What a guided filter (He et al. 2010), the picture its own guide, takes away: edges stay, low contrast goes.
    """
    grey = (picture * picture.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True).double() / 2 + 0.5
    mean = box_mean(grey, radius, circular)
    variance = (box_mean(grey**2, radius, circular) - mean**2).clamp(min=0)
    gain = variance / (variance + EPS)
    smooth = box_mean(gain, radius, circular) * grey + box_mean((1 - gain) * mean, radius, circular)
    return ((grey - smooth).abs() / EPS**0.5).clamp(max=1).to(picture.dtype)


def box_mean(x: Tensor, radius: int, circular: bool = False) -> Tensor:
    """Of each (..., H, W) the mean over the cells at most `radius` away on either axis, as far as there are any; if
    circular, round the borders, as often as it takes."""
    for axis in (-2, -1):
        length, x = x.shape[axis], x.transpose(axis, -1)
        i = torch.arange(length, device=x.device)
        if circular:
            rounds, rest = divmod(2 * radius + 1, length)
            total, first = F.pad(torch.cat([x, x], -1).cumsum(-1), (1, 0)), (i - radius) % length
            x = (rounds * total[..., length, None] + total[..., first + rest] - total[..., first]) / (2 * radius + 1)
        else:
            total = F.pad(x.cumsum(-1), (1, 0))
            first, last = (i - radius).clamp(min=0), (i + radius + 1).clamp(max=length)
            x = (total[..., last] - total[..., first]) / (last - first)
        x = x.transpose(axis, -1)
    return x
