"""The samplers of --scheduler: which scheduler of diffusers each is, and what A1111 calls it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """A class of diffusers with its options, A1111's name, and whether it can take Karras' noise levels."""

    scheduler: str
    a1111: str
    options: dict[str, Any] = field(default_factory=dict)
    karras: bool = True


SAMPLERS = {
    "ddim": Sampler("DDIMScheduler", "DDIM", {"clip_sample": False, "set_alpha_to_one": False}, karras=False),
    "euler": Sampler("EulerDiscreteScheduler", "Euler"),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", "Euler a", karras=False),
    "heun": Sampler("HeunDiscreteScheduler", "Heun"),
    "lms": Sampler("LMSDiscreteScheduler", "LMS"),
    "pndm": Sampler("PNDMScheduler", "PLMS", {"skip_prk_steps": True}, karras=False),
    "dpm++_2m": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "dpm++_2m_sde": Sampler("DPMSolverMultistepScheduler", "DPM++ 2M SDE", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler", "UniPC"),
}  # DDIM's options: not every model's config says so
KARRAS = tuple(name for name, sampler in SAMPLERS.items() if sampler.karras)


def set_scheduler(pipe: Any, name: str, karras: bool = False) -> None:
    """Put a sampler into the pipeline, with Karras' noise levels where it takes them and they are asked for."""
    import diffusers

    sampler = SAMPLERS[name]
    levels = {"use_karras_sigmas": karras} if sampler.karras else {}
    kind = getattr(diffusers, sampler.scheduler)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **sampler.options, **levels)
