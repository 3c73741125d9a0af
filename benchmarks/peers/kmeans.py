"""Attention by way of the means of k-means: improved Nystrom (Zhang et al. 2008) in Nystromformer's formula (Xiong et al. 2021).

What safari's clusters are without a token's own weight, counts, and a ridge that follows the picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.block_means import BlockMeanAttention, by_landmarks
from safari.clusters import averages, lloyd, spread
from sd_hyena.options.operators import register_operator


@register_operator("kmeans", "means of queries and keys over clusters of the keys, as landmarks", heads=True)
class KMeansAttention(BlockMeanAttention):
    """The same formula with q~, k~ the means of queries and keys over M clusters of keys, found among some tokens."""

    def __init__(self, d_model: int, heads: int, *, landmarks: int = 256, sample: int = 2048, steps: int = 2):
        super().__init__(d_model, heads, landmarks=landmarks)
        self.sample, self.steps = max(sample, landmarks), steps

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in streams)
        if x.shape[1] <= self.landmarks:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        chosen = spread(x.shape[1], min(self.sample, x.shape[1]), x.device)
        some_q, some_k = (torch.index_select(t, -2, chosen) for t in (q, k))
        labels = lloyd(some_k, self.landmarks, self.steps)
        q_, k_ = (averages(t, labels, t[..., : self.landmarks, :]) for t in (some_q, some_k))
        return by_landmarks(q, k, v, q_, k_).transpose(1, 2).flatten(2)
