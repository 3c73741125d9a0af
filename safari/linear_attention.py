"""Normalised multi-head linear attention: mixing by content in O(L).

LinFusion (Liu et al. 2024) for the form and its normalisation, Hedgehog (Zhang et al. 2024) for the learned feature map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safari.head_groups import Mix, mix_in_head_groups

FEATURE_MAPS = ("hedgehog", "elu")


class Hedgehog(nn.Module):
    """`phi(z) = [softmax(z W), softmax(-z W)]` per head, z scaled by head_dim^-1/4; W starts as the identity."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.scale = head_dim**-0.25
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, z: Tensor, heads: slice = slice(None)) -> Tensor:
        """(B, heads, E, L) -> (B, heads, 2 E, L)."""
        z = (self.scale * self.weight[heads]).mT @ z
        return torch.cat([z.softmax(-2), (-z).softmax(-2)], dim=-2)


class EluPlusOne(nn.Module):
    """`phi(z) = elu(z) + 1`."""

    def forward(self, z: Tensor, heads: slice = slice(None)) -> Tensor:
        return z.clamp(max=0).exp() + z.relu()  # faster than F.elu(z) + 1, which is the same


def linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = 1e-4) -> Tensor:
    """`q (mean k^T v) / (q . mean k + epsilon)` over (B, heads, E, L), q and k positive; means over tokens in float32."""
    q, k, v32 = (t.float() if t.dtype != torch.float64 else t for t in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        # The weights' sums are one more row of the same product, so no (E, L) temporary is made for them.
        context = torch.cat([v32 @ k.mT / k.shape[-1], k.mean(dim=-1).unsqueeze(-2)], dim=-2)
        y = context @ q
        return (y[..., :-1, :] / (y[..., -1:, :] + epsilon)).to(v.dtype)


class LinearAttention(nn.Module):
    """`linattn(phi(q + f_q(x)), phi(k + f_k(x)), v)`, with f a small MLP of the tokens whose last layer starts near zero.

    `width` is that of f's hidden layer, d_model / 4 by default, at least 8. Takes streams and tokens
    (B, L, D); the grid does not matter to it.
    """

    def __init__(self, d_model: int, heads: int, feature_map: str = "hedgehog", width: int = 0):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model}")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(FEATURE_MAPS)}")
        self.heads, self.head_dim = heads, d_model // heads
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

    def among(self, x: Tensor) -> Mix:
        """Among these tokens (B, L, D): the mixing of some heads, tokens first."""
        mix = self._among(x)
        return lambda q, k, v, channels: mix(q.mT, k.mT, v.mT, channels).mT

    def _among(self, x: Tensor) -> Mix:
        """The same, channels first."""
        hidden_q, hidden_k = self.f_q[:-1](x).mT, self.f_k[:-1](x).mT

        def mix(q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
            heads = slice(channels.start // self.head_dim, channels.stop // self.head_dim)
            q, k = _shifted(q, self.f_q[-1], hidden_q, channels), _shifted(k, self.f_k[-1], hidden_k, channels)
            q, k, v = (t.unflatten(1, (-1, self.head_dim)) for t in (q, k, v))
            return linear_attention(self.phi_q(q, heads), self.phi_k(k, heads), v).flatten(1, 2)

        return mix

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return mix_in_head_groups(self._among(x), streams, self.heads)


class LinFusion(LinearAttention):
    """LinFusion's form of it: `phi(z) = elu(z) + 1`, and f as wide as the tokens by default."""

    def __init__(self, d_model: int, heads: int, feature_map: str = "elu", width: int = 0):
        super().__init__(d_model, heads, feature_map, width or d_model)


def _shifted(stream: Tensor, last: nn.Linear, hidden: Tensor, channels: slice) -> Tensor:
    """`stream + last(hidden)`, of some channels; (B, C, L)."""
    weight = last.weight[channels].expand(len(hidden), -1, -1)
    return torch.baddbmm(stream, weight, hidden) + last.bias[channels, None]
