"""Attention by way of the means of blocks: Nystromformer (Xiong et al. 2021), over the plane."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator

RIDGE = 1e-2


@register_operator("nystromformer", "Nystromformer's: landmarks are means of blocks", heads=True)
class BlockMeanAttention(nn.Module):
    """`softmax(q k~^T) softmax(q~ k~^T)^+ softmax(q~ k^T) v`, with q~, k~ the means of queries and keys over some M blocks
    of the plane, as near to squares as divide it; the inverse is damped, in float64."""

    def __init__(self, d_model: int, heads: int, *, landmarks: int = 256):
        super().__init__()
        self.heads, self.landmarks = heads, landmarks

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in streams)
        if x.shape[1] <= self.landmarks:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        rows = min(size[0], max(1, round(math.sqrt(self.landmarks * size[0] / size[1]))))
        blocks = rows, min(size[1], max(1, self.landmarks // rows))
        q_, k_ = (_means(t, size, blocks) for t in (q, k))
        return by_landmarks(q, k, v, q_, k_).transpose(1, 2).flatten(2)


def by_landmarks(q: Tensor, k: Tensor, v: Tensor, q_: Tensor, k_: Tensor) -> Tensor:
    """(B, N, L, E) and landmarks (B, N, M, E) to (B, N, L, E)."""
    met = F.scaled_dot_product_attention(q_, k, v)
    between = (q_.double() @ k_.double().mT * q.shape[-1] ** -0.5).softmax(-1)
    identity = torch.eye(between.shape[-1], dtype=torch.float64, device=q.device)
    values = torch.linalg.solve(between.mT @ between + RIDGE**2 * identity, between.mT @ met.double())
    return F.scaled_dot_product_attention(q, k_, values.to(v.dtype).contiguous())


def _means(t: Tensor, size: tuple[int, int], blocks: tuple[int, int]) -> Tensor:
    """(B, N, L, E) to (B, N, M, E)."""
    plane = t.transpose(2, 3).flatten(0, 1).unflatten(-1, size)
    return F.adaptive_avg_pool2d(plane, blocks).flatten(2).unflatten(0, t.shape[:2]).transpose(2, 3).contiguous()
