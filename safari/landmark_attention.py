"""Attention by way of a few landmarks: mixing by content in O(L), close to the softmax it stands for.

Nystromformer (Xiong et al. 2021) for softmax attention from its values at landmarks; learned queries that gather tokens
(Set Transformer, Lee et al. 2019) for the landmarks, which so follow the picture's content and not its grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safari.head_groups import Mix, head_by_head, mix_in_head_groups


def ridge_solve(a: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
    """`(a^T a + ridge^2)^-1 a^T b` over (..., M, M) and (..., M, E): `a^-1 b` where that is well conditioned."""
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve_ex(a.mT @ a + ridge.square() * identity, a.mT @ b).result


class LandmarkAttention(nn.Module):
    """`softmax(q k~^T) softmax(q~ k~^T)^-1 softmax(q~ k^T) v` in every head, with M landmarks q~, k~ among the tokens.

        p = softmax(c k^T),   k~ = a_k p k + b_k,   q~ = a_q p q + b_q      c (M, E): what each landmark looks for

    All logits are scaled by E^-1/2, E = D / heads; c, a (1, E) and b (M, E) are learned. The inverse is damped by a
    learned ridge and taken in float64, where the device has it. Takes streams and tokens (B, L, D); the grid does not
    matter to it. Raises ValueError for sizes that cannot work.
    """

    def __init__(self, d_model: int, heads: int, landmarks: int = 128):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model}")
        if landmarks < 1:
            raise ValueError(f"landmarks={landmarks} must be positive")
        self.heads = heads
        e = d_model // heads
        self.seek = nn.Parameter(3 * torch.randn(heads, landmarks, e))
        self.a_q, self.a_k = (nn.Parameter(torch.ones(heads, 1, e)) for _ in range(2))
        self.b_q, self.b_k = (nn.Parameter(0.1 * torch.randn(heads, landmarks, e)) for _ in range(2))
        self.log_ridge = nn.Parameter(torch.full((heads, 1, 1), math.log(1e-2)))

    def among(self, x: Tensor) -> Mix:
        """Among these tokens (B, L, D): the mixing of some heads, tokens first."""
        return head_by_head(self._attend, self.seek.shape[-1])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
        """Of some heads: (B, heads, L, E) each -> (B, heads, L, E)."""
        attend, e = F.scaled_dot_product_attention, self.seek.shape[-1]
        heads = slice(channels.start // e, channels.stop // e)
        k = k - k.mean(dim=-2, keepdim=True)  # no softmax above sees it, but rounding does
        c, a_q, a_k, b_q, b_k = (t[heads].to(k.dtype) for t in (self.seek, self.a_q, self.a_k, self.b_q, self.b_k))
        c = c.expand(len(k), -1, -1, -1)
        k_, q_ = a_k * attend(c, k, k) + b_k, a_q * attend(c, k, q) + b_q
        met = attend(q_, k, v)
        with torch.autocast(k.device.type, enabled=False):
            wide = torch.float32 if k.device.type == "mps" else torch.float64
            between = (q_.to(wide) @ k_.to(wide).mT * e**-0.5).softmax(-1)
            values = ridge_solve(between, met.to(wide), self.log_ridge[heads].to(wide).exp())
        return attend(q, k_, values.to(met.dtype).contiguous())  # a solution's numbers lie in columns, which is slow

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return mix_in_head_groups(self.among(x), streams, self.heads, tokens_first=True, beside=self.seek.shape[1] ** 2)
