"""How sharp a self-attention is: what a student without training finds hard to follow."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safari.clusters import spread
from sd_hyena.students.student import Projections

QUERIES = 256  # of a picture, spread evenly: as many say as much as all


@torch.no_grad()
def entropy(x: Tensor, projections: Projections, heads: int) -> Tensor:
    """Mean entropy of the attention of tokens x (B, L, D) to each other, as a share of log L; ().

    1 is even attention to all, 0 attention to one token alone.
    """
    length = x.shape[1]
    chosen = spread(length, min(QUERIES, length), x.device)
    q, k = projections.to_q(x[:, chosen]), projections.to_k(x)
    q, k = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    log_p = (q @ k.mT * q.shape[-1] ** -0.5).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean() / math.log(max(length, 2))
