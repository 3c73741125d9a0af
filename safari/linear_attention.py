"""Normalised multi-head linear attention: mixing by content in O(L).

LinFusion (Liu et al. 2024) for the form and its normalisation, Hedgehog (Zhang et al. 2024) for the learned feature map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

FEATURE_MAPS = ("hedgehog", "elu")


class Hedgehog(nn.Module):
    """`phi(z) = [softmax(z W), softmax(-z W)]` per head, z scaled by head_dim^-1/4; W starts as the identity."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.scale = head_dim**-0.25
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """(B, heads, L, E) -> (B, heads, L, 2 E)."""
        z = self.scale * z @ self.weight
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)


class EluPlusOne(nn.Module):
    """`phi(z) = elu(z) + 1`."""

    def forward(self, z: Tensor) -> Tensor:
        return F.elu(z) + 1


def linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = 1e-4) -> Tensor:
    """`q (mean k^T v) / (q . mean k + epsilon)` over (B, heads, L, E), q and k positive; means over tokens in float32."""
    q, k, v32 = (t.float() if t.dtype != torch.float64 else t for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        context = k.mT @ v32 / k.shape[-2]
        weight = q @ k.mean(dim=-2).unsqueeze(-1)
        return (q @ context / (weight + epsilon)).to(v.dtype)


class LinearAttention(nn.Module):
    """`linattn(phi(q + f_q(x)), phi(k + f_k(x)), v)`, with f a small MLP of the tokens whose last layer starts near zero.

    `width` is that of f's hidden layer, d_model / 4 by default, at least 8. LinFusion's form is `feature_map="elu"` with
    `width=d_model`. Takes streams and tokens (B, L, D); the grid does not matter to it.
    """

    streams = 3

    def __init__(self, d_model: int, heads: int, feature_map: str = "hedgehog", width: int = 0):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(FEATURE_MAPS)}")
        self.heads = heads
        width = width or max(8, d_model // 4)

        def bottleneck() -> nn.Sequential:
            last = nn.Linear(width, d_model)
            nn.init.zeros_(last.bias)
            last.weight.data.mul_(0.1)
            return nn.Sequential(nn.Linear(d_model, width), nn.LayerNorm(width), nn.LeakyReLU(), last)

        def features() -> nn.Module:
            return Hedgehog(heads, d_model // heads) if feature_map == "hedgehog" else EluPlusOne()

        self.f_q, self.f_k = bottleneck(), bottleneck()
        self.phi_q, self.phi_k = features(), features()

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        q, k, v = streams
        q, k, v = (rearrange(t, "b l (n e) -> b n l e", n=self.heads) for t in (q + self.f_q(x), k + self.f_k(x), v))
        return rearrange(linear_attention(self.phi_q(q), self.phi_k(k), v), "b n l e -> b l (n e)")
