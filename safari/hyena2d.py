"""Hyena2d: a two-dimensional, non-causal Hyena operator for grids of any height and width. Ours.

It mixes by place (gated convolutions, explicit near and implicit far) and by content (attention by way of landmarks).
B batch, (H, W) the grid, L = H W, D channels. Filters are functions of offsets in cells, so one set serves every grid.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from safari.fftconv import long_conv2d, separable_conv2d
from safari.landmark_attention import LandmarkAttention
from safari.linear_attention import FEATURE_MAPS, LinearAttention
from safari.offset_filters import OffsetFilter
from safari.window_attention import window_attention

Long = Literal["full", "separable", "axial_1d", "none"]
Content = Literal["landmarks", "hedgehog", "elu", "none"]
Gates = Literal["diagonal", "dense"]


class Hyena2d(nn.Module):
    """Mixes the site's q, k, v (B, L, D) and its tokens x (B, L, D) over the grid.

        q, k, v = short_q(q), short_k(k), short_v(v)
        u = norm_u(gate_k(k) v)
        p = gain norm_p(gate_q(q) (local(u) + long(u - mean u) + skip u))     by place
        c = content(q0, k0, v0)                                               by content, of the streams as they came
        y = p + c + window_gate windows(q0, k0, v0)

    Args:
        heads: of the content branch, of the windows, and groups of the norms
        local: side of the explicit depthwise filter, odd; 0 leaves it out
        long: `full` filter over the plane by FFT, `separable` as `rank` products of a column and a row filter,
            `axial_1d` along rows plus along columns, or `none`
        reach: the farthest offset of the long filter in cells
        groups: filters of the long branch, each for D / groups channels; 0 means one for each channel
        filter_order: width of the filter's MLP
        content: attention by way of `landmarks`, linear attention with the feature map `hedgehog` or `elu`, or `none`
        landmarks: how many a head has
        window: side of the windows of an additional softmax attention; 0 leaves it out
        gates: one factor per channel, or a `dense` 1x1 convolution
        norm: normalise u and p per token and head

    Raises ValueError for options that cannot work.
    """

    streams = 3

    def __init__(
        self,
        d_model: int,
        heads: int,
        *,
        local: int = 9,
        long: Long = "none",
        rank: int = 4,
        reach: int = 64,
        groups: int = 0,
        filter_order: int = 32,
        content: Content = "landmarks",
        landmarks: int = 128,
        window: int = 0,
        gates: Gates = "diagonal",
        norm: bool = True,
    ):
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"heads={heads} must divide d_model={d_model}")
        if local < 0 or (local and local % 2 == 0):
            raise ValueError(f"local={local} must be odd, or 0 for none")
        if min(rank, reach, filter_order) < 1 or window < 0:
            raise ValueError(f"{rank=}, {reach=}, {filter_order=} must be positive, {window=} not negative")
        self.heads, self.window = heads, window
        self.short_q, self.short_k, self.short_v = (_depthwise(d_model, 3) for _ in range(3))
        self.gate_q, self.gate_k = _gate(d_model, gates), _gate(d_model, gates)
        self.norm_u, self.norm_p = (HeadNorm(d_model, heads) if norm else nn.Identity() for _ in range(2))
        self.skip = nn.Parameter(torch.ones(d_model, 1, 1))
        self.local = _depthwise(d_model, local, scale=0.0) if local else None
        self.long = _long(long, d_model, groups or d_model, rank, reach, filter_order)
        self.content = _content(content, d_model, heads, landmarks)
        self.window_gate = nn.Parameter(torch.zeros(d_model)) if window else None
        self.place_gain = nn.Parameter(torch.full((d_model, 1, 1), 0.1))

    def by_place(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, D, H, W) each -> (B, D, H, W)."""
        q, k, v = self.short_q(q), self.short_k(k), self.short_v(v)
        u = self.norm_u(self.gate_k(k) * v)
        mixed = self.skip * u
        if self.local is not None:
            mixed = mixed + self.local(u)
        if self.long is not None:
            # Without the mean a constant stays constant at the zero-padded border, and no DC bin grows large.
            mixed = mixed + self.long(u - u.mean(dim=(-2, -1), keepdim=True))
        return self.place_gain * self.norm_p(self.gate_q(q) * mixed)

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int]) -> Tensor:
        h, w = size
        grids = (rearrange(t, "b (h w) d -> b d h w", h=h, w=w) for t in streams)
        y = rearrange(self.by_place(*grids), "b d h w -> b (h w) d")
        if self.content is not None:
            y = y + self.content(streams, x)
        if self.window_gate is not None:
            y = y + self.window_gate * window_attention(*streams, self.heads, size, self.window)
        return y


class HeadNorm(nn.Module):
    """Root-mean-square norm of each token's channels, head by head, of (B, D, H, W); one gain per channel."""

    def __init__(self, d_model: int, heads: int, epsilon: float = 1e-6):
        super().__init__()
        self.heads, self.epsilon = heads, epsilon
        self.gain = nn.Parameter(torch.ones(d_model, 1, 1))

    def forward(self, u: Tensor) -> Tensor:
        z = rearrange(u, "b (n e) h w -> b n e h w", n=self.heads)
        wide = z if z.dtype == torch.float64 else z.float()
        z = z * torch.rsqrt(wide.square().mean(dim=2, keepdim=True) + self.epsilon).to(z.dtype)
        return self.gain * z.flatten(1, 2)


class Gate(nn.Module):
    """`a z + b` per channel, near one at the start."""

    def __init__(self, d_model: int):
        super().__init__()
        self.a = nn.Parameter(torch.full((d_model, 1, 1), 0.1))
        self.b = nn.Parameter(torch.ones(d_model, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        return self.a * z + self.b


class FullFilter(nn.Module):
    """Convolution with an implicit filter over the plane, by FFT; a large plane in tiles, which bounds the memory."""

    whole, tile = 512, 256  # cells a side: of the largest plane transformed at once, and of a tile

    def __init__(self, d_model: int, groups: int, reach: int, order: int):
        super().__init__()
        self.repeat, self.reach = d_model // groups, reach
        self.filter = OffsetFilter(groups, axes=2, order=order)

    def forward(self, u: Tensor) -> Tensor:
        h = self.filter(*(min(self.reach, n - 1) for n in u.shape[-2:]))
        tile = self.tile if max(u.shape[-2:]) > self.whole else 0
        return long_conv2d(u, h.repeat_interleave(self.repeat, dim=0), tile)


class SeparableFilter(nn.Module):
    """Convolution with a sum of `rank` products of a column and a row filter, by two matrix products."""

    def __init__(self, d_model: int, groups: int, rank: int, reach: int, order: int):
        super().__init__()
        self.repeat, self.rank, self.reach = d_model // groups, rank, reach
        self.down = OffsetFilter(groups * rank, axes=1, order=order, start=0.3)
        self.along = OffsetFilter(groups * rank, axes=1, order=order, start=0.3)

    def forward(self, u: Tensor) -> Tensor:
        filters = (f(min(self.reach, n - 1)) for f, n in zip((self.down, self.along), u.shape[-2:], strict=True))
        down, along = (
            rearrange(f, "(c r) d -> c r d", r=self.rank).repeat_interleave(self.repeat, dim=0) for f in filters
        )
        return separable_conv2d(u, down, along)


class AxialFilter(nn.Module):
    """Convolution along each column plus convolution along each row."""

    def __init__(self, d_model: int, groups: int, reach: int, order: int):
        super().__init__()
        self.repeat, self.reach = d_model // groups, reach
        self.down, self.along = (OffsetFilter(groups, axes=1, order=order) for _ in range(2))

    def forward(self, u: Tensor) -> Tensor:
        h, w = (min(self.reach, n - 1) for n in u.shape[-2:])
        down, along = (f.repeat_interleave(self.repeat, dim=0) for f in (self.down(h), self.along(w)))
        return long_conv2d(u, down[:, :, None]) + long_conv2d(u, along[:, None, :])


def _long(kind: str, d_model: int, groups: int, rank: int, reach: int, order: int) -> nn.Module | None:
    if groups < 1 or d_model % groups:
        raise ValueError(f"groups={groups} must divide d_model={d_model}")
    if kind == "full":
        return FullFilter(d_model, groups, reach, order)
    if kind == "separable":
        return SeparableFilter(d_model, groups, rank, reach, order)
    if kind == "axial_1d":
        return AxialFilter(d_model, groups, reach, order)
    if kind != "none":
        raise ValueError(f"long={kind!r} is not one of full, separable, axial_1d, none")
    return None


def _content(kind: str, d_model: int, heads: int, landmarks: int) -> nn.Module | None:
    if kind == "landmarks":
        return LandmarkAttention(d_model, heads, landmarks)
    if kind in FEATURE_MAPS:
        return LinearAttention(d_model, heads, kind)
    if kind != "none":
        raise ValueError(f"content={kind!r} is not one of landmarks, {', '.join(FEATURE_MAPS)}, none")
    return None


def _depthwise(d_model: int, side: int, scale: float = 1.0) -> nn.Conv2d:
    """A depthwise convolution that starts as `scale` times the identity."""
    conv = nn.Conv2d(d_model, d_model, side, padding=side // 2, padding_mode="replicate", groups=d_model)
    nn.init.zeros_(conv.weight).data[..., side // 2, side // 2] = scale
    nn.init.zeros_(conv.bias)
    return conv


def _gate(d_model: int, kind: str) -> nn.Module:
    if kind == "diagonal":
        return Gate(d_model)
    if kind != "dense":
        raise ValueError(f"gates={kind!r} is not one of diagonal, dense")
    gate = nn.Conv2d(d_model, d_model, 1)
    nn.init.dirac_(gate.weight).data.mul_(0.1)
    nn.init.ones_(gate.bias)
    return gate
