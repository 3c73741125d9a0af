"""The mixer that mixes nothing: what a student can do without looking at any other token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PointwiseMixer(nn.Module):
    """A two-layer MLP on each token's three concatenated streams, (B, L, D) each, `hidden` wide or 4 D.

    The baseline of every table: an operator that does not beat it has learnt no mixing.
    """

    def __init__(self, d_model: int, hidden: int = 0):
        super().__init__()
        hidden = hidden or 4 * d_model
        self.layers = nn.Sequential(nn.Linear(3 * d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.layers(torch.cat(tuple(streams), dim=-1)) + streams[-1]
