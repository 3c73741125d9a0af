"""Attention within a circle around each token, as CLEAR has it (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator

SIDE = 16  # cells of a square of queries


@register_operator("clear", "CLEAR's: softmax attention within a circle", heads=True)
class CircularAttention(nn.Module):
    """Softmax attention of each token to those at most `radius` cells away. Exact; a row of squares at a time, each of whose
    queries meet the keys of the square that is `radius` cells wider on all sides."""

    def __init__(self, d_model: int, heads: int, *, radius: int = 8):
        super().__init__()
        self.heads, self.radius = heads, radius

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        (h, w), margin = size, min(self.radius, max(size) - 1)  # no key is farther
        right, down = -w % SIDE, -h % SIDE
        around = (margin, margin + right, margin, margin + down)
        planes = [t.mT.unflatten(-1, size) for t in streams]  # (B, D, H, W)
        q = F.pad(planes[0], (0, right, 0, down))
        k, v = (F.pad(t, around) for t in planes[1:])
        there = F.pad(torch.ones(1, h, w, device=x.device), around)
        near = _circle(self.radius, margin, x.device)
        rows, side = [], SIDE + 2 * margin
        for top in range(0, h, SIDE):
            keys, values = (self._squares(t[:, :, top : top + side], side) for t in (k, v))
            mask = there[:, top : top + side].unfold(2, side, SIDE)  # 1, side, across, side
            mask = mask.transpose(1, 2).flatten(2).bool()[0, :, None, None] & near
            y = F.scaled_dot_product_attention(
                self._squares(q[:, :, top : top + SIDE], SIDE), keys, values, mask.repeat(len(x), 1, 1, 1)
            )  # (B across, heads, SIDE^2, E)
            y = y.unflatten(0, (len(x), -1)).unflatten(3, (SIDE, SIDE))  # B, across, heads, SIDE, SIDE, E
            rows.append(y.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[:, : h - top, :w])
        return torch.cat(rows, dim=1).flatten(1, 2)

    def _squares(self, strip: Tensor, side: int) -> Tensor:
        """Of (B, D, side, W), SIDE cells apart: (B across, heads, side^2, E)."""
        squares = strip.unfold(3, side, SIDE).unflatten(1, (self.heads, -1))  # B, heads, E, side, across, side
        return squares.permute(0, 4, 1, 3, 5, 2).flatten(3, 4).flatten(0, 1).contiguous()


def _circle(radius: int, margin: int, device: torch.device) -> Tensor:
    """Which cells of a square and its margin the square's queries see, (SIDE^2, (SIDE + 2 margin)^2)."""
    own, all_ = torch.arange(SIDE, device=device) + margin, torch.arange(SIDE + 2 * margin, device=device)
    apart = (own[:, None] - all_) ** 2
    return (apart[:, None, :, None] + apart[None, :, None, :] <= radius**2).flatten(2, 3).flatten(0, 1)
