"""Self-attention within rectangles of the picture: HyperTile, bricks, shifted windows.

B batch, L tokens, D channels, (H, W) the grid of tokens with H * W = L.

The seam is the call of a self-attention module, whichever stands there when it is called: an attention with any
processor, or a student, swapped in before or after. Nothing here draws from a global random state.
"""

from __future__ import annotations

import functools
import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.around import Around, standing
from sd_hyena.large.bricks import Rectangle, Shape, edges, get_bricks, grid
from sd_hyena.sites import find_sites, on_size

Size = tuple[int, int]


class Tiled(Around):
    """An attention called on rectangles instead of the whole grid; those of one size share one call, in the batch.

    Two may stand around each other: the inner one then cuts the tiles of the outer one.
    """

    def __init__(self, cut: Callable[[Size], list[Rectangle]]):
        super().__init__()
        self.cut = cut
        self.size: Size | None = None  # set by the enclosing transformer, or tile by tile from outside

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        """(B, L, D), or (B, D, H, W) as a VAE has it, to the same shape. Raises BadInput for a mask of another length.

        Cross-attention (encoder states given) and a single rectangle go straight through.
        """
        size = tuple(hidden_states.shape[-2:]) if hidden_states.ndim == 4 else self.size
        tiles = self.cut(size)
        if len(tiles) == 1 or encoder_hidden_states is not None:
            self._tell(size)
            return self.inner(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **kwargs,
            )
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        norm, y = getattr(self.attention, "group_norm", None), None
        normed = None if norm is None else norm(x.transpose(1, 2)).transpose(1, 2)
        for tile, index in _tokens(tiles, size[1], x.device).items():
            self._tell(tile)
            mask = _mask_of(attention_mask, index, x.shape[:2])
            with nullcontext() if norm is None else _normed_already(self.attention, _folded(normed, index)):
                part = self.inner(_folded(x, index), attention_mask=mask, **kwargs)
            y = part.new_empty(x.shape) if y is None else y
            y[:, index] = part.unflatten(0, (len(x), len(index)))
        return y.transpose(1, 2).unflatten(2, size) if hidden_states.ndim == 4 else y

    def _tell(self, size: Size) -> None:
        """A student, or a tiling within, what it works on."""
        if hasattr(self.inner, "size"):
            self.inner.size = size

    @property
    def attention(self) -> nn.Module:
        """The module behind all tilings."""
        return self.inner.attention if isinstance(self.inner, Tiled) else self.inner


@contextmanager
def _normed_already(attention: nn.Module, tokens: Tensor) -> Iterator[None]:
    """A VAE's attention holds the GroupNorm before it, which must see the whole map: hand it what that one made."""
    norm = attention.group_norm
    attention.group_norm = _Given(tokens.transpose(1, 2))
    try:
        yield
    finally:
        attention.group_norm = norm


class _Given(nn.Module):
    """A norm whose answer is known."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, _x: Tensor) -> Tensor:
        return self.answer


def _tokens(tiles: list[Rectangle], width: int, device: torch.device) -> dict[Size, Tensor]:
    """For each size of tile the raster numbers of its tokens, (tiles, tokens)."""
    by_size: dict[Size, list[tuple[int, int]]] = {}
    for tile in tiles:
        by_size.setdefault((tile.height, tile.width), []).append((tile.top, tile.left))
    result = {}
    for (h, w), corners in by_size.items():
        top, left = torch.tensor(corners, device=device).T[:, :, None, None]
        rows, columns = torch.arange(h, device=device)[:, None], torch.arange(w, device=device)
        result[h, w] = ((top + rows) * width + left + columns).flatten(1)
    return result


def _folded(x: Tensor, index: Tensor) -> Tensor:
    """(B, L, D) -> (B tiles, tokens, D). The batch is the outer axis, so what a processor makes of its parts holds."""
    return x[:, index].flatten(0, 1)


def _mask_of(mask: Tensor | None, index: Tensor, batch_and_length: tuple[int, int]) -> Tensor | None:
    """An additive mask (B or B heads, 1 or L queries, L keys) for tiles folded into the batch."""
    if mask is None:
        return None
    batch, length = batch_and_length
    mask = mask[:, None] if mask.ndim == 2 else mask
    if mask.shape[2] != length or mask.shape[1] not in (1, length):
        raise BadInput(f"an attention mask of shape {tuple(mask.shape)} cannot be tiled over {length} tokens")
    queries = index if mask.shape[1] > 1 else index.new_zeros(len(index), 1)
    parts = mask.unflatten(0, (batch, -1))[
        :, :, queries[:, :, None], index[:, None, :]
    ]  # B, heads, tiles, queries, keys
    return parts.transpose(1, 2).flatten(0, 2)


class Progress:
    """Which step of a sampling run a UNet is in: one more at each lower timestep, 0 again when the timestep rises.

    So an image gets the same tilings whatever was drawn before it, and all calls of one step agree.
    """

    def __init__(self):
        self.step, self.timestep = 0, None

    def note(self, _unet: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[1] if len(args) > 1 else kwargs["timestep"]
        timestep = float(torch.as_tensor(given).max())
        if self.timestep is not None and timestep != self.timestep:
            self.step = self.step + 1 if timestep < self.timestep else 0
        self.timestep = timestep


class Seat(NamedTuple):
    """Where a self-attention sits: at `path` of the module `owner` that calls it."""

    owner: nn.Module
    path: str
    name: str  # module path in the model
    number: int
    depth: int  # 0 at the finest grid that has self-attention, one more for each halving


def _is_unet(model: nn.Module) -> bool:
    """Or its lower half, a ControlNet."""
    return hasattr(model, "down_blocks")


def _seats(model: nn.Module) -> list[Seat]:
    if _is_unet(model):
        sites = find_sites(model)
        finest = min((site.level for site in sites), default=0)
        blocks = [model.get_submodule(site.name.removesuffix(".attn1")) for site in sites]
        return [
            Seat(block, "attn1", site.name, n, site.level - finest)
            for n, (site, block) in enumerate(zip(sites, blocks, strict=True))
        ]
    middles = {
        f"{side}.mid_block": getattr(getattr(model, side, None), "mid_block", None) for side in ("encoder", "decoder")
    }
    if None in middles.values():
        raise BadInput(f"no self-attention to tile in {type(model).__name__}; give pipe.unet or pipe.vae")
    return [
        Seat(middle, f"attentions.{i}", f"{name}.attentions.{i}", n, 0)
        for n, (name, middle) in enumerate(middles.items())
        for i, attention in enumerate(middle.attentions)
        if attention is not None
    ]


Plan = Callable[[Seat, Progress, Size], list[Rectangle]]


@contextmanager
def _tiled(model: nn.Module, max_depth: int, plan: Plan) -> Iterator[nn.Module]:
    if max_depth not in range(4):
        raise BadInput(f"max_depth={max_depth} must be 0, 1, 2 or 3; 0 tiles the finest level only")
    progress = Progress()
    with ExitStack() as stack:
        if _is_unet(model):
            stack.callback(model.register_forward_pre_hook(progress.note, with_kwargs=True).remove)
        for seat in _seats(model):
            if seat.depth <= max_depth:
                tiled = Tiled(functools.partial(plan, seat, progress))
                if _is_unet(model):
                    stack.callback(on_size(model, seat.name, functools.partial(setattr, tiled, "size")).remove)
                stack.enter_context(standing(seat.owner, seat.path, tiled))
        yield model


def _counts(length: int, smallest: int, how_many: int) -> list[int]:
    """The `how_many` largest numbers of pieces that leave each at least `smallest` long."""
    most = max(1, length // smallest)
    return list(range(most, max(0, most - how_many), -1))


@contextmanager
def split_attention(
    model: nn.Module,
    /,
    aspect_ratio: float | None = None,
    tile_size: int = 256,
    swap_size: int = 2,
    *,
    disable: bool = False,
    max_depth: int = 0,
    scale_depth: bool = False,
    seed: int | None = None,
    timestep_range: tuple[float, float] | None = None,
) -> Iterator[nn.Module]:
    """Within the block, the self-attention of a UNet, ControlNet or VAE works in tiles: HyperTile (tfernd, 2023), any H and W.

    At each step and site the number of tiles per side is drawn anew among the `swap_size` largest that leave no tile
    below `tile_size` (pixels, 8 to a token at every level); tiles of a side are equal to one token. The draws depend on
    `seed` (None: a fresh one), the step and the site alone. A VAE's GroupNorm still sees the whole map.

    `max_depth` 0 tiles the finest level that has self-attention (SD 1.x: the latent's own; SDXL: half of it), up to 3;
    `scale_depth` doubles the smallest tile per level. `timestep_range` (low, high), ends included: tile only at these
    timesteps of the UNet. `aspect_ratio` is HyperTile's and ignored: the true (H, W) is known.

    Yields the model. Raises BadInput before anything is changed.
    """
    if tile_size < 32:
        raise BadInput(f"tile_size={tile_size} must be at least 32 pixels; 256 is usual, 128 for a VAE")
    if swap_size < 1:
        raise BadInput(f"swap_size={swap_size} must be at least 1, which draws the smallest tile only")
    if timestep_range is not None and not timestep_range[0] <= timestep_range[1]:
        raise BadInput(f"timestep_range={timestep_range} must be (low, high); timesteps run from 999 down to 0")
    if timestep_range is not None and not _is_unet(model):
        raise BadInput(f"timestep_range={timestep_range} is for a UNet; a VAE has no timesteps")
    seed = secrets.randbits(64) if seed is None else seed

    def plan(seat: Seat, progress: Progress, size: Size) -> list[Rectangle]:
        if timestep_range and not timestep_range[0] <= progress.timestep <= timestep_range[1]:
            return [Rectangle(0, 0, *size)]
        smallest = (tile_size // 8) << (seat.depth if scale_depth else 0)
        source = random.Random(f"{seed} {progress.step} {seat.name}")
        rows, columns = (edges(side, source.choice(_counts(side, smallest, swap_size))) for side in size)
        return grid(rows, columns)

    if disable:
        yield model
        return
    with _tiled(model, max_depth, plan):
        yield model


@contextmanager
def brick_attention(
    model: nn.Module,
    /,
    attn_slice_x: int = 64,
    attn_slice_y: int = 64,
    attn_shape: Shape = "brick",
    *,
    max_depth: int = 1,
) -> Iterator[nn.Module]:
    """Within the block, a UNet's or ControlNet's self-attention works in bricks, tiles or shifted windows (tokens; see `get_bricks`).

    Four tilings take turns: each site is one further than the site before it, each step one further than the last, so
    what one tiling parts the next joins. `max_depth` as in `split_attention`. Yields the model. Raises BadInput before
    anything is changed.
    """
    get_bricks(1, 1, 0, attn_slice_x, attn_slice_y, attn_shape)

    def plan(seat: Seat, progress: Progress, size: Size) -> list[Rectangle]:
        height, width = size
        return get_bricks(width, height, seat.number + progress.step, attn_slice_x, attn_slice_y, attn_shape)

    with _tiled(model, max_depth, plan):
        yield model
