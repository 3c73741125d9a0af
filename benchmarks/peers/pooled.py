"""Attention to fewer keys and values: ToDo's token downsampling (Smith et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator


@register_operator("todo", "ToDo's: keys and values pooled over squares", heads=True)
class PooledAttention(nn.Module):
    """Softmax attention to the means of keys and values over squares of `side` cells; those at the border may be smaller."""

    def __init__(self, d_model: int, heads: int, *, side: int = 2):
        super().__init__()
        self.heads, self.side = heads, side

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = streams
        k, v = (F.avg_pool2d(t.mT.unflatten(-1, size), self.side, ceil_mode=True).flatten(2).mT for t in (k, v))
        # In order, for PyTorch's kernel is five times slower on keys whose channels lie apart.
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous() for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
