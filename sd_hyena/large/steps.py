"""A network as a list of steps, each of which knows the cells of its input that a cell of its output sees.

B batch, C channels, G groups of a GroupNorm, (H, W) cells of a map. A span is [start, stop) along one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Span = tuple[int, int]
Layer = Callable[[Tensor], Tensor]
QUERIES = KEYS = 2048  # of an attention, at once


class Moments:
    """Mean and variance of each image's groups, merged from tiles with the variance between them (Chan et al. 1979)."""

    def __init__(self, groups: int, dtype: torch.dtype):
        self.groups, self.dtype = groups, dtype
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: summed squared distances from the mean

    def add(self, tile: Tensor) -> None:
        """Take in a tile (B, C, h, w)."""
        if 0 in tile.shape:
            return
        grouped = tile.to(self.dtype).unflatten(1, (self.groups, -1)).flatten(2)
        variance, mean = torch.var_mean(grouped, -1, correction=0)
        n, before = grouped.shape[-1], self.count
        self.count += n
        distance = mean - self.mean
        self.mean = self.mean + distance * (n / self.count)
        self.squares = self.squares + variance * n + distance.square() * (before * n / self.count)

    def normalize(self, tile: Tensor, norm: nn.GroupNorm) -> Tensor:
        """(B, C, h, w) as the norm would give it if it saw the whole map."""
        rstd = (self.squares / self.count + norm.eps).rsqrt()
        repeats = tile.shape[1] // self.groups
        scale = rstd.repeat_interleave(repeats, 1) * norm.weight.to(rstd)
        shift = norm.bias.to(rstd) - self.mean.repeat_interleave(repeats, 1) * scale
        wide = torch.promote_types(tile.dtype, torch.float32)
        return torch.addcmul(shift[..., None, None].to(wide), tile.to(wide), scale[..., None, None].to(wide)).to(tile)

    def finite(self) -> bool:
        return bool((self.mean.isfinite() & self.squares.isfinite()).all())


class Step:
    """What is true of a step that maps each cell to the same cell."""

    def size(self, n: int) -> int:
        """Length of the output's axis for n cells of the input's."""
        return n

    def source(self, span: Span) -> Span:
        """The input's cells that a span of the output sees; it may reach over the border."""
        return span

    def origin(self, start: int) -> int:
        """The output's cell with which the output of a window starts that starts at this cell of the input."""
        return start


@dataclass(frozen=True, eq=False)
class Norm(Step):
    """A GroupNorm, which sees the whole map. One that `keeps` opens a residual block: its input is added back later."""

    module: nn.GroupNorm
    keeps: bool = False


@dataclass(frozen=True, eq=False)
class Add(Step):
    """The end of a residual block; a shortcut sees one cell."""

    shortcut: Layer | None = None
    divisor: float = 1.0

    def __call__(self, tile: Tensor, kept: Tensor) -> Tensor:
        return ((kept if self.shortcut is None else self.shortcut(kept)) + tile) / self.divisor


@dataclass(frozen=True, eq=False)
class Local(Step):
    """A module that pads its borders with zeros and sees `halo` cells in each direction."""

    module: nn.Module
    halo: int = 0

    def source(self, span: Span) -> Span:
        return span[0] - self.halo, span[1] + self.halo


class Down(Local):
    """Half as many cells: 3×3, stride 2, padded at the right and at the bottom only."""

    def size(self, n: int) -> int:
        return n // 2

    def source(self, span: Span) -> Span:
        return 2 * span[0], 2 * span[1] + 1

    def origin(self, start: int) -> int:
        return start // 2


class Up(Local):
    """Twice as many cells: nearest neighbour, then 3×3."""

    def size(self, n: int) -> int:
        return 2 * n

    def source(self, span: Span) -> Span:
        return (span[0] - 1) // 2, (span[1] + 2) // 2

    def origin(self, start: int) -> int:
        return 2 * start


@dataclass(frozen=True, eq=False)
class Attend(Step):
    """Self-attention over the whole map, with its own norm and residual, in chunks of queries and of keys.

    The layers map tokens (B, l, C) each by itself.
    """

    module: nn.GroupNorm
    to_q: Layer
    to_k: Layer
    to_v: Layer
    to_out: Layer
    heads: int = 1
    divisor: float = 1.0

    def __call__(self, tokens: Tensor, moments: Moments, store, device: torch.device) -> Iterator[Tensor]:
        """Replace tokens (B, L, C) of a store by their attention's output; yields it chunk by chunk as (B, C, l, 1).

        Softmax over the chunks of keys as they come (Milakov and Gimelshein 2018), in float32 at least.
        """
        length = tokens.shape[1]
        wide = torch.promote_types(tokens.dtype, torch.float32)

        def normal(start: int, n: int) -> tuple[Tensor, Tensor]:
            x = tokens[:, start : start + n].to(device)
            return x, moments.normalize(x.mT[..., None], self.module)[..., 0].mT

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        keys, values = None, None
        for start in range(0, length, KEYS):
            _, x = normal(start, KEYS)
            k, v = self.to_k(x), self.to_v(x)
            if keys is None:
                keys, values = (store.empty((*tokens.shape[:2], y.shape[-1]), y.dtype) for y in (k, v))
            keys[:, start : start + KEYS], values[:, start : start + KEYS] = k, v
            store.settle()
        for start in range(0, length, QUERIES):
            x, y = normal(start, QUERIES)
            q = heads(self.to_q(y))
            q = q * q.shape[-1] ** -0.5
            top, total, mixed = -torch.inf, 0.0, 0.0
            for other in range(0, length, KEYS):
                k, v = (heads(z[:, other : other + KEYS].to(device)) for z in (keys, values))
                scores = (q @ k.mT).to(wide)
                higher = scores.amax(-1, keepdim=True).clamp(min=top)
                decay, p = (top - higher).exp(), scores.sub_(higher).exp_()
                total = total * decay + p.sum(-1, keepdim=True)
                mixed = mixed * decay + (p.to(v) @ v).to(wide)
                top = higher
                store.settle()
            y = self.to_out((mixed / total).to(x).transpose(1, 2).flatten(2))
            y = (x + y) / self.divisor
            tokens[:, start : start + QUERIES] = y
            yield y.mT[..., None]
