"""The mixer that mixes nothing: what a student can do without looking at any other token."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PointwiseMixer(nn.Module):
    """A two-layer MLP on each token's concatenated streams, (B, L, D) each.

    The baseline of every table: an operator that does not beat it has learnt no mixing.
    """

    def __init__(self, d_model: int, streams: int = 3, hidden: int | None = None):
        super().__init__()
        hidden = hidden or 4 * d_model
        self.streams = streams
        self.layers = nn.Sequential(nn.Linear(streams * d_model, hidden), nn.GELU(), nn.Linear(hidden, d_model))

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.layers(torch.cat(tuple(streams), dim=-1)) + streams[-1]
