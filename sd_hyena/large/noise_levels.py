"""How much of a picture and how much noise are in a scheduler's latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def levels(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Picture and noise of its latents at each of the timesteps (B,), both (B, 1, 1, 1) float32.

    By the scheduler's class: what stands in for `add_noise` on the instance may put noise of its own there, as regions do.
    """
    add, one = type(scheduler).add_noise, torch.ones(len(timesteps), 1, 1, 1, device=timesteps.device)
    return add(scheduler, one, 0 * one, timesteps), add(scheduler, 0 * one, one, timesteps)
