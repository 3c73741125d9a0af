"""Operations of a run's parts, each counted once a process: on fake tensors a large model takes seconds."""

from __future__ import annotations

from typing import Any

import torch

from sd_hyena.cost.activations import saved_bytes
from sd_hyena.cost.operations import student_flops, unet_flops, vae_flops
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.student import Size, StudentSpec

_counted: dict[tuple, Any] = {}


def _once(key: tuple, count) -> Any:
    if key not in _counted:
        _counted[key] = count()
    return _counted[key]


def of_unet(unet: Any, size: Size, last: str = "") -> int:
    """A forward of one sample of latents (H, W), up to the site `last` if named."""
    key = "unet", str(sorted(unet.config.items(), key=str)), size, last
    return _once(key, lambda: unet_flops(unet, size, last))


def of_vae(vae: Any, size: Size) -> tuple[int, int]:
    """Encoder and decoder for latents (H, W)."""
    return _once(("vae", str(sorted(vae.config.items(), key=str)), size), lambda: vae_flops(vae, size))


def of_student(spec: StudentSpec, size: Size) -> int:
    """A forward of one sample of (H, W) tokens."""
    return _once(("student", repr(spec), tuple(size)), lambda: student_flops(spec, size))


def saved_by(spec: StudentSpec, size: Size, dtype: torch.dtype) -> int:
    """Bytes of one sample of (H, W) tokens that wait for the backward pass."""
    return _once(("saved", repr(spec), tuple(size), dtype), lambda: saved_bytes(spec, size, dtype))


class PictureCost:
    """Operations of one picture that a run learns from: the steps it is drawn in, and its way to the run's size."""

    def __init__(self, pipe: Any, config: TrainConfig):
        self.pipe, self.config = pipe, config
        side = pipe.unet.config.sample_size
        self.size, self.native = (config.height // 8, config.width // 8), (side, side)

    @property
    def steps(self) -> int:
        """Of the teacher's drawing it, with guidance if asked."""
        config = self.config
        if config.data in ("images", "latents"):
            return 0
        own = self.size if config.data == "trajectories" else self.native
        return config.sample_steps * (2 if config.cfg_scale > 1 else 1) * of_unet(self.pipe.unet, own)

    @property
    def encoding(self) -> int:
        """Of the VAE's bringing it to the run's size."""
        if self.config.data in ("trajectories", "latents"):
            return 0
        if self.config.data == "images":
            return of_vae(self.pipe.vae, self.size)[0]
        resizes = self.size != self.native
        return of_vae(self.pipe.vae, self.native)[1] + of_vae(self.pipe.vae, self.size)[0] if resizes else 0

    @property
    def share_of_steps(self) -> float:
        """Of the whole."""
        encoding = self.encoding
        return self.steps / (self.steps + encoding) if encoding else 1.0
