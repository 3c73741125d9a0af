"""Attention to oneself and to the clusters of this very picture's keys: close to softmax attention without any training.

Nystromformer (Xiong et al. 2021) for attention by way of landmarks at which it is known; k-means for the landmarks (Zhang et al.
2008, "Improved Nystrom low-rank approximation"), of the keys, head by head (clustered attention, Vyas et al. 2020); an exact
sparse part in the same normaliser (Scatterbrain, Chen et al. 2021), of which a token's own weight is what pays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safari.clusters import averages, lloyd, sizes, spread
from safari.head_groups import Mix, head_by_head, mix_in_head_groups
from safari.landmark_attention import ridge_solve

RIDGE, LEAST_RIDGE = 3e-2, 2e-3  # float32 solves with the latter to a thousandth of what is missing
SOME = 512  # tokens are enough for a mean square


class ClusterAttention(nn.Module):
    """Softmax attention of each token to itself and to M clusters of tokens, in every head.

        y_i = (sum_j n_j exp(q_i k~_j) z_j + exp(q_i k_i) v_i) / (sum_j n_j exp(q_i k~_j) + exp(q_i k_i))

    Cluster j, found by its keys, has n_j tokens, whose means are q~_j, k~_j, v~_j. What it tells, z_j, is fitted: near v~_j, and
    such that each mean token is answered as softmax attention answers its query,

        z = v~ + (A^T A + ridge^2)^-1 A^T (y* - y(v~))      A (M, M): their weights, y*: attention's answers to q~

    All logits are scaled by E^-1/2, E = D / heads. The ridge is a share of s^2, s the root mean square of the logits q (k - k~)
    that clustering leaves out, and the little that solving in float32 asks for: soft attention is all but interpolated, sharp
    attention relies on the means. Equal values stay equal. Where there are no more tokens than landmarks it is softmax
    attention itself.

    Args:
        landmarks: M, of a head
        sample: how many tokens are clustered, at least M, spread evenly over the picture; all of a smaller one
        steps: assignments of Lloyd's iteration
        learned: `k~ <- k~ turn`, and a factor to n and to the ridge of each head, which start as what they are without;
            else there are no weights at all

    Takes streams and tokens (B, L, D); the grid does not matter to it. Raises ValueError for sizes that cannot work.
    """

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
        if min(landmarks, sample, steps) < 1:
            raise ValueError(f"{landmarks=}, {sample=}, {steps=} must be positive")
        self.heads, self.head_dim = heads, d_model // heads
        self.landmarks, self.sample, self.steps, self.learned = landmarks, max(sample, landmarks), steps, learned
        if learned:
            self.turn = nn.Parameter(torch.eye(self.head_dim).repeat(heads, 1, 1))
            self.log_n, self.log_ridge = (nn.Parameter(torch.zeros(heads, 1, 1)) for _ in range(2))

    def among(self, x: Tensor) -> Mix:
        """Among these tokens (B, L, D): the mixing of some heads, tokens first."""
        return head_by_head(self._attend, self.head_dim)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
        """Of some heads: (B, heads, L, E) each -> (B, heads, L, E)."""
        attend, e = F.scaled_dot_product_attention, self.head_dim
        if k.shape[-2] <= self.landmarks:
            y = attend(q, k, v)
            if self.learned and torch.is_grad_enabled():  # a gradient of zero, for what waits for one from every weight
                y = y + 0 * sum(weight.sum() for weight in self.parameters())
            return y
        with torch.autocast(k.device.type, enabled=False):
            q_, k_, v_, n, ridge, middle = self._clusters(q, k, v)
            seen = k_
            if self.learned:
                heads = slice(channels.start // e, channels.stop // e)
                turn, log_n, log_ridge = (t[heads].to(k_) for t in (self.turn, self.log_n, self.log_ridge))
                seen, n, ridge = k_ @ turn, n * log_n.exp(), ridge * log_ridge.exp()
            answers = attend(q_.to(q.dtype), k, v)

            logits = _queries(q_, k_) @ _keys(seen, n, k_.dtype).mT * e**-0.5
            of_clusters, own = logits.softmax(-1).split([self.landmarks, 1], dim=-1)
            missing = answers - own * v_ - of_clusters @ v_
            z = v_ + ridge_solve(of_clusters, missing, ridge + LEAST_RIDGE)

            if q.device.type == "cpu" and not torch.is_grad_enabled():
                own = (k - middle).mul_(q).sum(dim=-1, keepdim=True) * e**-0.5
                return _answers(q, v, own, seen.to(q.dtype), n.log(), z.to(v.dtype))
            queries = _queries(q, k.to(k_.dtype) - middle)
            y = attend(queries, _keys(seen, n, q.dtype), _values(z.to(v.dtype), queries.shape[-1]), scale=e**-0.5)
            return torch.addcmul(y[..., :e], y[..., e : e + 1], v)

    def _clusters(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """q~, k~, v~ (B, heads, M, E), n (B, heads, M, 1), the ridge, and what is taken off keys, in float32 at least."""
        length, m = k.shape[-2], self.landmarks
        chosen = spread(length, min(self.sample, length), k.device)
        q, k, v = (t.index_select(-2, chosen).to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        middle = k.mean(dim=-2, keepdim=True)  # no softmax sees it, but rounding does
        k = k - middle
        labels = lloyd(k, m, self.steps)
        q_, k_, v_ = (averages(t, labels, t[..., :m, :]) for t in (q, k, v))
        n = sizes(labels, m).clamp(min=1).to(k) * (length / len(chosen))
        return q_, k_, v_, n, RIDGE * _left_out(q, k, k_, labels), middle

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return mix_in_head_groups(self.among(x), streams, self.heads, tokens_first=True, beside=self.landmarks**2)


def _answers(q: Tensor, v: Tensor, own: Tensor, k_: Tensor, log_n: Tensor, z: Tensor) -> Tensor:
    """To q (B, heads, L, E) with the own v, and logits (B, heads, L, 1); k~, z (B, heads, M, E), log n (B, heads, M, 1).

    PyTorch's attention on a CPU tells the logarithm of what it divides by, against which the own weight stands: nothing
    has to be put beside queries, keys and values. Without gradient.
    """
    bias = log_n.mT.expand(*q.shape[:-1], -1)
    y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k_, z, attn_mask=bias)
    return y.lerp_(v, (own - log_sum[..., None]).sigmoid_().to(y.dtype))


# One softmax over the clusters and oneself, whose key differs from token to token: its logit comes with the query, as a
# further channel that only the last key sees, and its weight goes with the answer, in a further channel of the values.


def _queries(q: Tensor, k: Tensor) -> Tensor:
    """q (..., L, E) with the product with its own key, and ones; (..., L, E + 2), with terms of half precision E + 4."""
    own = _terms((q.to(k.dtype) * k).sum(dim=-1, keepdim=True), q.dtype)
    return torch.cat([q, *own, *(torch.ones_like(t) for t in own)], dim=-1)


def _keys(k_: Tensor, n: Tensor, dtype: torch.dtype) -> Tensor:
    """k~ (..., M, E) with the logarithm of n (..., M, 1), and the key that is oneself; (..., M + 1, E + 2 or 4)."""
    e = k_.shape[-1]
    log_n = _terms(n.log() * e**0.5, dtype)  # no logit yet
    clusters = torch.cat([F.pad(k_.to(dtype), (0, len(log_n))), *log_n], dim=-1)
    oneself = torch.zeros_like(clusters[..., :1, :])
    oneself[..., e : e + len(log_n)] = 1
    return torch.cat([clusters, oneself], dim=-2)


def _values(z: Tensor, width: int) -> Tensor:
    """z (..., M, E) with nothing for oneself but a one in channel E; (..., M + 1, width)."""
    m, e = z.shape[-2:]
    values = F.pad(z, (0, width - e, 0, 1))
    values[..., m, e] = 1
    return values


def _terms(t: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What adds up to t in a dtype: itself, or two where that rounds."""
    first = t.to(dtype)
    return (first,) if dtype == t.dtype else (first, (t - first).to(dtype))


def _left_out(q: Tensor, k: Tensor, k_: Tensor, labels: Tensor) -> Tensor:
    """Mean square of the logits q (k - k~), k~ the means of their clusters, over all pairs of some tokens; (B, N, 1, 1)."""
    with torch.no_grad():
        q, k, labels = q[..., :SOME, :], k[..., :SOME, :], labels[..., :SOME]
        rest = k - k_.gather(-2, labels[..., None].expand_as(k))
        pairs = (q.mT @ q) * (rest.mT @ rest)
        return pairs.sum(dim=(-2, -1), keepdim=True) / (k.shape[-2] ** 2 * k.shape[-1])
