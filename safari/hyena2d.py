"""Hyena2d: a two-dimensional, non-causal Hyena operator for grids of any height and width. Ours.

It mixes by place (gated convolutions, explicit near and implicit far) and by content (attention by way of clusters of tokens).
B batch, (H, W) the grid, L = H W, D channels. Filters are functions of offsets in cells, so one set serves every grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from safari.cluster_attention import ClusterAttention
from safari.fftconv import convolve2d, filter_spectrum, spectrum_bytes, transform_size
from safari.filter_cache import FilterCache
from safari.head_groups import heads_at_once, mix_in_head_groups
from safari.landmark_attention import LandmarkAttention
from safari.linear_attention import FEATURE_MAPS, LinearAttention
from safari.offset_filters import OffsetFilter
from safari.toeplitz import axial_conv2d, separable_conv2d
from safari.window_attention import window_attention

Long = Literal["full", "separable", "axial_1d", "none"]
Content = Literal["clusters", "landmarks", "hedgehog", "elu", "none"]
Gates = Literal["diagonal", "dense"]
Convolution = Callable[[Tensor, slice], Tensor]  # of (B, C, H, W) with the filters of these channels


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
        content: attention by way of `clusters` of the picture's own tokens, of learned `landmarks`, linear attention with
            the feature map `hedgehog` or `elu`, or `none`
        landmarks: how many clusters or landmarks a head has
        window: side of the windows of an additional softmax attention; 0 leaves it out
        gates: one factor per channel, or a `dense` 1x1 convolution
        norm: normalise u and p per token and head

    With clusters it starts as these alone: as attention nearly, its place branch at gain zero.

    Raises ValueError for options that cannot work.
    """

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
        content: Content = "clusters",
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
        self.short_q, self.short_k, self.short_v = (Depthwise(d_model, 3) for _ in range(3))
        self.gate_q, self.gate_k = _gate(d_model, gates), _gate(d_model, gates)
        self.norm_u, self.norm_p = (HeadNorm(d_model, heads) if norm else NoNorm() for _ in range(2))
        self.skip = nn.Parameter(torch.ones(d_model, 1, 1))
        self.local = Depthwise(d_model, local, scale=0.0) if local else None
        self.long = _long(long, d_model, groups or d_model, rank, reach, filter_order)
        self.content = _content(content, d_model, heads, landmarks)
        self.window_gate = nn.Parameter(torch.zeros(d_model)) if window else None
        self.place_gain = nn.Parameter(torch.full((d_model, 1, 1), 0.0 if content == "clusters" else 0.1))

    def by_place(self, q: Tensor, k: Tensor, v: Tensor, channels: slice, long: Convolution | None) -> Tensor:
        """Of some channels, whole heads: (B, C, H, W) each -> (B, C, H, W)."""
        u = self.norm_u(self.gate_k.behind(self.short_k, k, channels) * self.short_v(v, channels), channels)
        mixed = self.skip[channels] * u if self.local is None else self.local(u, channels, skip=self.skip)
        if long is not None:
            # Without the mean a constant stays constant at the zero-padded border, and no DC bin grows large.
            mixed = mixed + long((u - u.mean(dim=(-2, -1), keepdim=True)).contiguous(), channels)
        p = self.gate_q.behind(self.short_q, q, channels) * mixed
        return self.norm_p(p, channels, self.place_gain)

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        long = self.long(size) if self.long is not None else None
        content = self.content.among(x) if self.content is not None else None

        def mix(q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
            y = self.by_place(*(t.mT.unflatten(-1, size) for t in (q, k, v)), channels, long).flatten(2).mT
            if content is not None:
                y = y + content(q, k, v, channels)
            if self.window_gate is not None:
                heads = q.shape[-1] * self.heads // len(self.skip)
                y = y + self.window_gate[channels] * window_attention(q, k, v, heads, size, self.window)
            return y

        dense = isinstance(self.gate_q, DenseGate)  # which mixes the heads
        at_once = self.heads if dense else heads_at_once(self.heads, x, planes=True)
        return mix_in_head_groups(mix, streams, self.heads, at_once, tokens_first=True)


class Depthwise(nn.Conv2d):
    """A convolution of each channel of (B, D, H, W) with a square of its own, the border cells repeated outwards.

    It starts as `scale` times the identity. Given fewer channels, (B, C, H, W), it is told which. What follows it and is
    as linear costs nothing: `skip z` beside it, and a gate behind all.
    """

    def __init__(self, d_model: int, side: int, scale: float = 1.0):
        super().__init__(d_model, d_model, side, padding=side // 2, padding_mode="replicate", groups=d_model)
        nn.init.zeros_(self.weight).data[..., side // 2, side // 2] = scale
        nn.init.zeros_(self.bias)

    def forward(
        self, z: Tensor, channels: slice = slice(None), skip: Tensor | None = None, gate: Gate | None = None
    ) -> Tensor:
        on_cpu = z.device.type == "cpu"
        wide = torch.promote_types(z.dtype, torch.float32) if on_cpu else z.dtype  # a processor's halves are slow
        weight, bias, margin = self.weight[channels].to(wide), self.bias[channels].to(wide), (self.padding[0],) * 4
        if skip is not None:
            weight = weight + F.pad(skip[channels, None], margin)
        if gate is not None:
            a, b = gate.a[channels], gate.b[channels]
            weight, bias = a[..., None] * weight, torch.addcmul(b.flatten(), a.flatten(), bias)
        in_order = torch.channels_last if on_cpu else torch.contiguous_format  # to pad another view is slow
        padded = F.pad(z.contiguous(memory_format=in_order), margin, mode="replicate").to(wide)
        return F.conv2d(padded, weight, bias, groups=z.shape[1]).to(z.dtype)


class HeadNorm(nn.Module):
    """Root-mean-square norm of each token's channels, head by head, of (B, D, H, W); one gain per channel."""

    def __init__(self, d_model: int, heads: int, epsilon: float = 1e-6):
        super().__init__()
        self.head_dim, self.epsilon = d_model // heads, epsilon
        self.gain = nn.Parameter(torch.ones(d_model, 1, 1))

    def forward(self, u: Tensor, channels: slice = slice(None), gain: Tensor | None = None) -> Tensor:
        """Times a further gain (D, 1, 1), if one is given."""
        z = rearrange(u, "b (n e) h w -> b h w n e", e=self.head_dim)
        wide = torch.promote_types(z.dtype, torch.float32)
        length = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=wide)
        z = z * torch.rsqrt(length.square() / self.head_dim + self.epsilon).to(z.dtype)
        gains = self.gain if gain is None else gain * self.gain
        return (rearrange(z, "b h w n e -> b h w (n e)") * gains[channels].flatten()).movedim(-1, 1)


class NoNorm(nn.Module):
    """In place of a norm that is left out."""

    def forward(self, u: Tensor, channels: slice = slice(None), gain: Tensor | None = None) -> Tensor:
        return u if gain is None else gain[channels] * u


class Gate(nn.Module):
    """`a z + b` per channel, near one at the start."""

    def __init__(self, d_model: int):
        super().__init__()
        self.a = nn.Parameter(torch.full((d_model, 1, 1), 0.1))
        self.b = nn.Parameter(torch.ones(d_model, 1, 1))

    def behind(self, short: Depthwise, z: Tensor, channels: slice) -> Tensor:
        """Of what a convolution makes of z (B, C, H, W)."""
        return short(z, channels, gate=self)


class DenseGate(nn.Conv2d):
    """A 1x1 convolution over all channels at once, near one at the start."""

    def __init__(self, d_model: int):
        super().__init__(d_model, d_model, 1)
        nn.init.dirac_(self.weight).data.mul_(0.1)
        nn.init.ones_(self.bias)

    def behind(self, short: Depthwise, z: Tensor, channels: slice) -> Tensor:
        """Of what a convolution makes of z (B, D, H, W)."""
        return self(short(z, channels))


class FullFilter(nn.Module):
    """Convolution with an implicit filter over the plane, by FFT; a large plane in tiles, which bounds the memory."""

    whole, tile = 512, 256  # cells a side: of the largest plane transformed at once, and of a tile

    def __init__(self, d_model: int, groups: int, reach: int, order: int):
        super().__init__()
        self.groups, self.repeat, self.reach = groups, d_model // groups, reach
        self.filter = OffsetFilter(groups, axes=2, order=order)
        self.cache = FilterCache()

    def forward(self, size: tuple[int, int]) -> Convolution:
        tile = self.tile if max(size) > self.whole else 0
        reach = tuple(min(self.reach, n - 1) for n in size)
        n = transform_size(size, reach, tile)

        def spectrum(groups: slice) -> Tensor:
            return filter_spectrum(self.filter(*reach, channels=groups), n)

        # All at once if they can be kept, else for some channels at a time, anew in every call.
        whole = None
        if self.groups * spectrum_bytes(n, self.filter.log_rate.dtype) <= self.cache.budget:
            weights = self.filter.parameters()
            (whole,) = self.cache.get((reach, n), weights, lambda: (spectrum(slice(self.groups)),))

        def convolve(u: Tensor, channels: slice) -> Tensor:
            first, last = channels.start // self.repeat, (channels.stop - 1) // self.repeat + 1
            some = whole[first:last] if whole is not None else spectrum(slice(first, last))
            if self.repeat > 1:
                some = some[torch.arange(channels.start, channels.stop, device=u.device) // self.repeat - first]
            return convolve2d(u, some, n, reach, tile)

        return convolve


class AxisFilters(nn.Module):
    """Implicit filters along the columns and along the rows, `rank` of each for every channel."""

    def __init__(self, d_model: int, groups: int, rank: int, reach: int, order: int, start: float):
        super().__init__()
        self.repeat, self.rank, self.reach = d_model // groups, rank, reach
        self.down, self.along = (OffsetFilter(groups * rank, axes=1, order=order, start=start) for _ in range(2))
        self.cache = FilterCache()

    def filters(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(D, rank, 2 r_y + 1) and (D, rank, 2 r_x + 1)."""
        reach = tuple(min(self.reach, n - 1) for n in size)

        def make() -> tuple[Tensor, Tensor]:
            return tuple(
                rearrange(f(r), "(c r) d -> c r d", r=self.rank).repeat_interleave(self.repeat, dim=0)
                for f, r in zip((self.down, self.along), reach, strict=True)
            )

        return self.cache.get(reach, self.parameters(), make)


class SeparableFilter(AxisFilters):
    """Convolution with a sum of `rank` products of a column and a row filter, by two matrix products."""

    def __init__(self, d_model: int, groups: int, rank: int, reach: int, order: int):
        super().__init__(d_model, groups, rank, reach, order, start=0.3)

    def forward(self, size: tuple[int, int]) -> Convolution:
        down, along = self.filters(size)
        return lambda u, channels: separable_conv2d(u, down[channels], along[channels])


class AxialFilter(AxisFilters):
    """Convolution along each column plus convolution along each row."""

    def __init__(self, d_model: int, groups: int, reach: int, order: int):
        super().__init__(d_model, groups, 1, reach, order, start=0.1)

    def forward(self, size: tuple[int, int]) -> Convolution:
        down, along = self.filters(size)
        return lambda u, channels: axial_conv2d(u, down[channels], along[channels])


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
    if kind == "clusters":
        return ClusterAttention(d_model, heads, landmarks, learned=True)
    if kind == "landmarks":
        return LandmarkAttention(d_model, heads, landmarks)
    if kind in FEATURE_MAPS:
        return LinearAttention(d_model, heads, kind)
    if kind != "none":
        raise ValueError(f"content={kind!r} is not one of clusters, landmarks, {', '.join(FEATURE_MAPS)}, none")
    return None


def _gate(d_model: int, kind: str) -> nn.Module:
    if kind == "diagonal":
        return Gate(d_model)
    if kind != "dense":
        raise ValueError(f"gates={kind!r} is not one of diagonal, dense")
    return DenseGate(d_model)
