"""An AutoencoderKL as a list of steps, each of which knows the cells of its input that a cell of its output sees.

B batch, C channels, G groups of a GroupNorm, (H, W) cells of a map. A span is [start, stop) along one axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import Tensor, nn

from sd_hyena.errors import BadInput

Span = tuple[int, int]
BLOCKS = (UNetMidBlock2D, DownEncoderBlock2D, UpDecoderBlock2D, AttnDownEncoderBlock2D, AttnUpDecoderBlock2D)
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
    """The end of a residual block."""

    block: ResnetBlock2D

    def __call__(self, tile: Tensor, kept: Tensor) -> Tensor:
        shortcut = self.block.conv_shortcut
        return ((kept if shortcut is None else shortcut(kept)) + tile) / self.block.output_scale_factor


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
    """Self-attention over the whole map, with its own norm and residual, in chunks of queries and of keys."""

    attention: Attention

    @property
    def module(self) -> nn.GroupNorm:
        return self.attention.group_norm

    def __call__(self, tokens: Tensor, moments: Moments, store, device: torch.device) -> Iterator[Tensor]:
        """Replace tokens (B, L, C) of a store by their attention's output; yields it chunk by chunk as (B, C, l, 1).

        Softmax over the chunks of keys as they come (Milakov and Gimelshein 2018), in float32 at least.
        """
        attention, length = self.attention, tokens.shape[1]
        wide = torch.promote_types(tokens.dtype, torch.float32)

        def normal(start: int, n: int) -> tuple[Tensor, Tensor]:
            x = tokens[:, start : start + n].to(device)
            return x, moments.normalize(x.mT[..., None], attention.group_norm)[..., 0].mT

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)

        keys, values = None, None
        for start in range(0, length, KEYS):
            _, x = normal(start, KEYS)
            k, v = attention.to_k(x), attention.to_v(x)
            if keys is None:
                keys, values = (store.empty((*tokens.shape[:2], y.shape[-1]), y.dtype) for y in (k, v))
            keys[:, start : start + KEYS], values[:, start : start + KEYS] = k, v
            store.settle()
        for start in range(0, length, QUERIES):
            x, y = normal(start, QUERIES)
            q = heads(attention.to_q(y))
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
            y = (mixed / total).to(x).transpose(1, 2).flatten(2)
            for layer in attention.to_out:
                y = layer(y)
            y = (x + y) / attention.rescale_output_factor
            tokens[:, start : start + QUERIES] = y
            yield y.mT[..., None]


def _resnet(block: ResnetBlock2D) -> list[Step]:
    first = [Norm(block.norm1, keeps=True), Local(block.nonlinearity), Local(block.conv1, 1)]
    return [*first, Norm(block.norm2), Local(block.nonlinearity), Local(block.conv2, 1), Add(block)]


def _block(block: nn.Module) -> Iterator[Step]:
    """Of the middle, or of a level of the encoder or decoder."""
    if not isinstance(block, BLOCKS):
        raise BadInput(f"this VAE has a {type(block).__name__}, which tiles cannot follow; use mode='blend'")
    for resnet, attention in zip_longest(block.resnets, getattr(block, "attentions", ())):
        yield from _resnet(resnet)
        if attention is not None:
            yield Attend(attention)
    yield from map(Down, getattr(block, "downsamplers", None) or ())
    yield from map(Up, getattr(block, "upsamplers", None) or ())


def _out(part: nn.Module) -> list[Step]:
    return [Norm(part.conv_norm_out), Local(part.conv_act), Local(part.conv_out, 1)]


def encoder_steps(vae: AutoencoderKL) -> list[Step]:
    """From an image to the moments of its latents. Raises BadInput for blocks of another kind."""
    part = vae.encoder
    blocks = [step for block in (*part.down_blocks, part.mid_block) for step in _block(block)]
    quant = [] if vae.quant_conv is None else [Local(vae.quant_conv)]
    return [Local(part.conv_in, 1), *blocks, *_out(part), *quant]


def decoder_steps(vae: AutoencoderKL) -> list[Step]:
    """From latents to an image. Raises BadInput for blocks of another kind."""
    part = vae.decoder
    quant = [] if vae.post_quant_conv is None else [Local(vae.post_quant_conv)]
    blocks = [step for block in (part.mid_block, *part.up_blocks) for step in _block(block)]
    return [*quant, Local(part.conv_in, 1), *blocks, *_out(part)]
