"""Attention within a circle around each token, as CLEAR has it (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator

ROWS = 8  # of queries at once


@register_operator("clear", "CLEAR's: softmax attention within a circle", heads=True)
class CircularAttention(nn.Module):
    """Softmax attention of each token to those at most `radius` cells away. Exact; a strip of rows at a time."""

    def __init__(self, d_model: int, heads: int, *, radius: int = 8):
        super().__init__()
        self.heads, self.radius = heads, radius

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = size
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).unflatten(2, size) for t in streams)
        strips = []
        for top in range(0, h, ROWS):
            bottom = min(top + ROWS, h)
            first, last = max(top - self.radius, 0), min(bottom + self.radius, h)
            near = self._near(range(top, bottom), range(first, last), w, x.device)
            keys, values = (t[:, :, first:last].flatten(2, 3) for t in (k, v))
            strips.append(F.scaled_dot_product_attention(q[:, :, top:bottom].flatten(2, 3), keys, values, near))
        return torch.cat(strips, dim=2).transpose(1, 2).flatten(2)

    def _near(self, rows: range, among: range, w: int, device: torch.device) -> Tensor:
        """Which tokens of some rows see which of others, (queries, keys)."""
        y, y_ = (torch.arange(r.start, r.stop, device=device) for r in (rows, among))
        x = torch.arange(w, device=device)
        square = (y[:, None, None, None] - y_[None, None, :, None]) ** 2 + (x[None, :, None, None] - x) ** 2
        return (square <= self.radius**2).flatten(2, 3).flatten(0, 1)
