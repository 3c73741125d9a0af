"""Pure geometry of tiles on a canvas of latent cells: where they lie, what they cut out, how much each cell counts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sd_hyena.errors import BadInput

WEIGHTS = ("uniform", "gaussian", "cosine", "ramp")
FLOOR = 1e-6  # of a weight's peak: a Gaussian's corner is 1e-11, which half precision calls zero
COARSEST = 6  # halvings between the latent and the coarsest map of a UNet

Size = tuple[int, int]  # height, width
T = TypeVar("T")


class Rect(NamedTuple):
    """A rectangle in cells. On a circular canvas it may reach over the lower and right border, into the opposite one."""

    top: int
    left: int
    height: int
    width: int

    @classmethod
    def of_fractions(cls, x: float, y: float, w: float, h: float, canvas: Size) -> Rect:
        """The cells that a rectangle in fractions of the canvas touches: rounded outwards, clipped, at least one."""
        top, height = _cells(y, h, canvas[0])
        left, width = _cells(x, w, canvas[1])
        return cls(top, left, height, width)


def _cells(start: float, length: float, total: int) -> tuple[int, int]:
    first = min(int(round(start * total, 6)), total - 1)  # .29 · 100 is 28.999999999999996
    return first, min(max(math.ceil(round(length * total, 6)), 1), total - first)


def starts(length: int, tile: int, overlap: int = 0, shift: float | None = None, circular: bool = False) -> list[int]:
    """Where tiles begin on an axis of `length` cells: every cell is covered, neighbours share at least `overlap`.

    Without `shift` they are spread evenly, with the first and the last at the borders. With a `shift` in 0 ... 1 they
    lie one stride apart, moved by that part of a stride; those that would leave the axis are pushed back inside. On a
    circular axis they go round, moved by that part of the axis. A tile longer than the axis is cut to it.
    """
    if tile > length:
        tile, overlap = length, overlap * length // tile
    stride = tile - overlap
    if circular:
        count = -(-length // stride)
        return [(int((shift or 0) * length) + i * length // count) % length for i in range(count)]
    last = length - tile
    if shift is None:
        count = -(-last // stride)
        return [i * last // count for i in range(count)] + [last]
    offset = int(shift * stride)
    return sorted({min(max(start, 0), last) for start in range(-offset, last + stride, stride)})


def grid(
    canvas: Size, tile: Size, overlap: int = 0, shift: tuple[float, float] | None = None, circular: bool = False
) -> list[Rect]:
    """Tiles of one size that cover the canvas, row by row; `starts` on each axis."""
    height, width = min(tile[0], canvas[0]), min(tile[1], canvas[1])
    down, right = shift or (None, None)
    return [
        Rect(top, left, height, width)
        for top in starts(canvas[0], tile[0], overlap, down, circular)
        for left in starts(canvas[1], tile[1], overlap, right, circular)
    ]


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in as few batches of at most `size` as possible, as equal as possible."""
    count = -(-len(items) // size)
    bounds = [i * len(items) // count for i in range(count + 1)] if count else []
    for i, j in pairwise(bounds):
        yield items[i:j]


def cut(x: Tensor, rect: Rect, canvas: Size) -> Tensor:
    """What of a map (..., H', W') lies in a rectangle of the canvas (H, W).

    The map may have k cells for each of the canvas (an image has 8) or one for 2, 4, 8 ... of them, rounded up (the
    inner maps of a UNet); of those the nearest cells are taken. Raises BadInput for a map of any other size.
    """
    rows, columns = _index(rect, canvas, tuple(x.shape[-2:]), x.device)
    return x[..., rows[:, None], columns]


def add(canvas: Tensor, rect: Rect, values: Tensor) -> None:
    """Add values (..., h, w) to the canvas (..., H, W) where the rectangle lies, in place."""
    size = tuple(canvas.shape[-2:])
    rows, columns = _index(rect, size, size, canvas.device)
    canvas[..., rows[:, None], columns] += values


def _index(rect: Rect, canvas: Size, size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    fine = size[0] // canvas[0]
    if fine and size == (fine * canvas[0], fine * canvas[1]):
        firsts, lengths, step = (fine * rect.top, fine * rect.left), (fine * rect.height, fine * rect.width), 1
    else:
        step = _halvings(canvas, size)
        firsts, lengths = (rect.top, rect.left), (-(-rect.height // step), -(-rect.width // step))
    rows, columns = (
        (first + step * torch.arange(length, device=device)) // step % total
        for first, length, total in zip(firsts, lengths, size, strict=True)
    )
    return rows, columns


def _halvings(canvas: Size, size: Size) -> int:
    for step in (2**n for n in range(1, COARSEST + 1)):
        if size == (-(-canvas[0] // step), -(-canvas[1] // step)):
            return step
    raise BadInput(
        f"a mask or map of {size[1]}x{size[0]} does not fit latents of {canvas[1]}x{canvas[0]} cells; "
        f"give it the picture's size, {8 * canvas[1]}x{8 * canvas[0]}"
    )


def weights(kind: str, height: int, width: int, overlap: int = 0) -> Tensor:
    """How much each cell of a tile counts, (height, width) in float32, at most 1, never zero.

    uniform: MultiDiffusion (Bar-Tal et al. 2023). gaussian: Mixture of Diffusers (Jiménez 2023), variance .01 of the
    tile's own side. ramp and cosine: flat inside, down over `overlap` cells so that two neighbours add up to 1.
    """
    return (_profile(kind, height, overlap)[:, None] * _profile(kind, width, overlap)).clamp(min=FLOOR).float()


def _profile(kind: str, length: int, overlap: int) -> Tensor:
    i = torch.arange(length, dtype=torch.float64)
    if kind == "uniform":
        return torch.ones_like(i)
    if kind == "gaussian":
        return torch.exp(-(((i - (length - 1) / 2) / length) ** 2) / (2 * 0.01))
    ramp = ((torch.minimum(i, length - 1 - i) + 1) / (overlap + 1)).clamp(max=1)
    return ramp if kind == "ramp" else torch.sin(math.pi / 2 * ramp) ** 2


def feather(rect: Rect, canvas: Size, ratio: float) -> Tensor:
    """How opaque a foreground rectangle is, (height, width): 1 inside, falling to 0 at the edges as a square.

    The fall is `ratio` of half the short side wide (Tiled Diffusion's rule). An edge on the canvas's border, where there
    is nothing to blend with, does not fall.
    """
    radius = min(int(min(rect.height // 2, rect.width // 2) * ratio), (min(rect.height, rect.width) - 1) // 2)
    rows = _depth(rect.top, rect.height, canvas[0], radius)
    columns = _depth(rect.left, rect.width, canvas[1], radius)
    depth = torch.minimum(rows[:, None], columns)
    return (depth / radius) ** 2 if radius else torch.ones(rect[2:])


def _depth(start: int, length: int, total: int, radius: int) -> Tensor:
    """How far each cell lies from the edges that are inside the canvas, at most `radius`."""
    i, deep = torch.arange(length), torch.full((length,), radius)
    before = i if start > 0 else deep
    after = length - 1 - i if start + length < total else deep
    return torch.minimum(before, after).clamp(max=radius)
