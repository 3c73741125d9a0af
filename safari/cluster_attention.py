"""Attention by way of the clusters of this very picture's keys: close to softmax attention without any training.

Nystromformer (Xiong et al. 2021) for softmax attention from its values at landmarks; k-means for the landmarks (Zhang et al.
2008, "Improved Nystrom low-rank approximation"), of the keys, head by head (clustered attention, Vyas et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safari.clusters import averages, lloyd, spread
from safari.head_groups import Mix, mix_in_head_groups
from safari.landmark_attention import ridge_solve

RIDGE = 3e-3


class ClusterAttention(nn.Module):
    """`softmax(q k~^T) softmax(q~ k~^T)^-1 softmax(q~ k^T) v` in every head, k~ and q~ the means of M clusters of keys.

    A cluster is found by its keys; k~ is the mean of these, q~ the mean of the same tokens' queries. All logits are scaled by
    E^-1/2, E = D / heads. The inverse is least squares damped by a ridge, of what differs from the mean value, so that equal
    values stay equal. Where there are no more tokens than landmarks it is softmax attention itself.

    Args:
        landmarks: M, of a head
        sample: how many tokens are clustered, spread evenly over the picture; all of a smaller one
        steps: assignments of Lloyd's iteration
        learned: `k~ <- a_k k~`, `q~ <- a_q q~ + b_q` with weights (heads, 1, E) and a ridge of each head, which start as
            what they are without; else there are no weights at all

    Takes streams and tokens (B, L, D); the grid does not matter to it. Raises ValueError for sizes that cannot work.
    """

    streams = 3

    def __init__(
        self,
        d_model: int,
        heads: int,
        landmarks: int = 256,
        *,
        sample: int = 2048,
        steps: int = 2,
        learned: bool = False,
    ):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model}")
        if min(landmarks, steps) < 1:
            raise ValueError(f"landmarks={landmarks} and steps={steps} must be positive")
        if sample < landmarks:
            raise ValueError(f"sample={sample} must hold at least the landmarks={landmarks}")
        self.heads, self.head_dim = heads, d_model // heads
        self.landmarks, self.sample, self.steps, self.learned = landmarks, sample, steps, learned
        if learned:
            e = self.head_dim
            self.a_q, self.a_k = (nn.Parameter(torch.ones(heads, 1, e)) for _ in range(2))
            self.b_q = nn.Parameter(torch.zeros(heads, 1, e))
            self.log_ridge = nn.Parameter(torch.full((heads, 1, 1), math.log(RIDGE)))

    def among(self, x: Tensor) -> Mix:
        """Among these tokens (B, L, D): the mixing of some heads, channels first."""

        def mix(q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
            q, k, v = (t.unflatten(1, (-1, self.head_dim)).mT.contiguous() for t in (q, k, v))
            return self._attend(q, k, v, channels).mT.flatten(1, 2)

        return mix

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
        """Of some heads: (B, heads, L, E) each -> (B, heads, L, E)."""
        attend, heads = (
            F.scaled_dot_product_attention,
            slice(*(c // self.head_dim for c in (channels.start, channels.stop))),
        )
        if k.shape[-2] <= self.landmarks:
            return attend(q, k, v)
        with torch.autocast(k.device.type, enabled=False):
            k_, q_ = self._landmarks(q, k, heads)
            wide = torch.float32 if k.device.type == "mps" else torch.float64
            met = attend(q_.to(q.dtype), k, v).to(wide)
            mean = met.mean(dim=-2, keepdim=True)
            between = (q_.to(wide) @ k_.to(wide).mT * self.head_dim**-0.5).softmax(-1)
            ridge = self.log_ridge[heads].to(wide).exp() if self.learned else between.new_tensor(RIDGE)
            values = mean + ridge_solve(between, met - mean, ridge)
            return attend(q, k_.to(k.dtype), values.to(v.dtype))

    def _landmarks(self, q: Tensor, k: Tensor, heads: slice) -> tuple[Tensor, Tensor]:
        """k~ and q~ of some heads, (B, heads, M, E) each, in float32 at least."""
        length, m = k.shape[-2], self.landmarks
        chosen = spread(length, min(self.sample, length), k.device)
        q, k = (t[..., chosen, :].to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k))
        k = k - k.mean(dim=-2, keepdim=True)  # no softmax sees it, but rounding does
        labels = lloyd(k, m, self.steps)
        k_, q_ = (averages(t, labels, t[..., :m, :]) for t in (k, q))
        if not self.learned:
            return k_, q_
        a_k, a_q, b_q = (t[heads].to(k_) for t in (self.a_k, self.a_q, self.b_q))
        return a_k * k_, a_q * q_ + b_q

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        def mix(q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
            q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
            return self._attend(q, k, v, channels).transpose(1, 2).flatten(2)

        return mix_in_head_groups(mix, streams, self.heads, tokens_first=True)
