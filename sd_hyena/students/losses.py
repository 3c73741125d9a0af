"""How far a student is from its teacher. Plain functions of (B, L, D) tensors, computed in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MIN_SNR_GAMMA = 5.0


def relative_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """`|y^ - y|^2 / |y - mean y|^2`, the mean per channel over the batch: 1 is a constant guess, 0 is perfect."""
    prediction, target = prediction.float(), target.float()
    spread = (target - target.mean(dim=(0, 1), keepdim=True)).square().sum()
    return (prediction - target).square().sum() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def error_and_spread(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`|y^ - y|^2` and `|y - mean y|^2` of each sample alone, (B,) each; sum both before dividing.

    A mean of ratios would be ruled by the samples whose target hardly varies.
    """
    prediction, target = prediction.float(), target.float()
    spread = (target - target.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return (prediction - target).square().sum(dim=(1, 2)), spread


def by_timestep(error: Tensor, spread: Tensor, timestep: Tensor) -> dict[str, Tensor]:
    """The relative error in each quarter of the 1000 timesteps that occurs, by name (`t250-500`)."""
    quarter = timestep.div(250, rounding_mode="floor").long()
    return {
        f"t{250 * q:03d}-{250 * (q + 1)}": error[quarter == q].sum() / spread[quarter == q].sum()
        for q in quarter.unique().tolist()
    }


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine between predicted and true tokens."""
    return torch.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance."""
    return unconditional + scale * (conditional - unconditional)


def min_snr_weight(scheduler: Any, timesteps: Tensor) -> Tensor:
    """Weight (B,) of a prediction's squared error at each timestep: Hang et al. 2023, for epsilon or velocity."""
    alpha = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr = alpha / (1 - alpha)
    below = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp_max(MIN_SNR_GAMMA) / below
