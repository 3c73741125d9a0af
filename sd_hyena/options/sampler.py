"""The samplers of --scheduler: which scheduler of diffusers each is, what A1111 calls it, and what it cannot do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sd_hyena.errors import BadInput


@dataclass(frozen=True)
class Sampler:
    """A class of diffusers with its options, A1111's name, and whether it can take Karras' noise levels.

    `pure_noise`: whether it can start where nothing of the picture is left (zero terminal SNR); `fewest`: steps below
    which it draws something else than it draws with many, measured on the shipped model (docs/log.md, 2026-11-28).
    """

    scheduler: str
    a1111: str
    options: dict[str, Any] = field(default_factory=dict)
    karras: bool = True
    pure_noise: bool = True
    fewest: int = 1


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False, "set_alpha_to_one": False}, karras=False),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", karras=False),
    "heun": Sampler("HeunDiscreteScheduler", "Heun", pure_noise=False, fewest=10),
    "lms": Sampler("LMSDiscreteScheduler", "LMS", pure_noise=False),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}, karras=False, pure_noise=False, fewest=10),
    "dpm++_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpm++_2m_sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
}  # DDIM's options: not every model's config says so
KARRAS = tuple(name for name, sampler in SAMPLERS.items() if sampler.karras)


PURE_NOISE = tuple(name for name, sampler in SAMPLERS.items() if sampler.pure_noise)


def check_sampler(name: str, noise_levels: Mapping[str, Any]) -> None:
    """Raise BadInput for a sampler that would use other noise levels than the model was trained with, in silence.

    noise_levels: the configuration of the model's scheduler.
    """
    if noise_levels.get("rescale_betas_zero_snr") and not SAMPLERS[name].pure_noise:
        raise BadInput(
            f"scheduler={name!r} cannot start from pure noise, as this model was trained to (ztsnr); "
            f"use {', '.join(PURE_NOISE)}"
        )


def note_on_steps(name: str, steps: int) -> str:
    """What to know of a sampler with so few steps; empty if there is nothing."""
    fewest = SAMPLERS[name].fewest
    if steps >= fewest:
        return ""
    return f"note: {name} draws badly in {steps} steps; give it {fewest} or more, or use --scheduler dpm++_2m or ddim"


def set_scheduler(pipe: Any, name: str, karras: bool = False) -> None:
    """Put a sampler into the pipeline, with Karras' noise levels where it takes them and they are asked for.

    Raises BadInput as `check_sampler`.
    """
    import diffusers

    check_sampler(name, pipe.scheduler.config)

    sampler = SAMPLERS[name]
    levels = {"use_karras_sigmas": karras} if sampler.karras else {}
    kind = getattr(diffusers, sampler.scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **sampler.options, **levels)
