"""How far a student is from its teacher. Plain functions of (B, L, D) tensors, computed in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """`|y^ - y|^2 / |y - mean y|^2`, the mean per channel over the batch: 1 is a constant guess, 0 is perfect."""
    prediction, target = prediction.float(), target.float()
    spread = (target - target.mean(dim=(0, 1), keepdim=True)).square().sum()
    return (prediction - target).square().sum() / spread.clamp_min(torch.finfo(torch.float32).tiny)


def relative_mse_per_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """The same for each sample alone, (B,)."""
    prediction, target = prediction.float(), target.float()
    spread = (target - target.mean(dim=1, keepdim=True)).square().sum(dim=(1, 2))
    return (prediction - target).square().sum(dim=(1, 2)) / spread.clamp_min(torch.finfo(torch.float32).tiny)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean cosine between predicted and true tokens."""
    return torch.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
