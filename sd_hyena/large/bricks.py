"""Ways to cut a grid of tokens into rectangles that attend within themselves, and a picture of them. No models."""

from __future__ import annotations

import colorsys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing

if TYPE_CHECKING:
    from PIL.Image import Image

Shape = Literal["brick", "tile", "shifted"]
SMALLEST = 8  # tokens; a quarter of a shorter piece may be no step at all


class Rectangle(NamedTuple):
    """A part of a grid, in tokens."""

    top: int
    left: int
    height: int
    width: int


def edges(length: int, count: int, quarter: int = 0) -> list[int]:
    """Where a side of `length` is cut into `count` equal pieces (to one token), moved on by quarters of a piece.

    What a move pushes over the end comes in at the start, as a shorter piece. One piece is never cut.
    """
    inner = {(4 * i + quarter) * length // (4 * count) for i in range(count)} if count > 1 else set()
    return sorted({0, length} | inner)


def grid(rows: list[int], columns: list[int]) -> list[Rectangle]:
    """The rectangles between the edges of rows and of columns."""
    return [
        Rectangle(top, left, bottom - top, right - left)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(columns)
    ]


def get_bricks(
    width: int, height: int, index: int, slice_x: int = 64, slice_y: int = 64, shape: Shape = "brick"
) -> list[Rectangle]:
    """Tiling number `index` (modulo 4) of a grid of width x height tokens: every token in exactly one rectangle.

    `brick` (after LargeResPatch): courses of bricks 2 slice_x wide and slice_y high, each course half a brick further
    than the one above; odd tilings turn this by 90°, the second pair moves it by a quarter of a brick and half a course.
    `shifted` (after HiDiffusion's windows, not wrapped around): slice_x x slice_y, moved by a quarter each time.
    `tile`: the same without moving. No rectangle is larger than named, and those of a course are equal to one token.
    Raises BadInput.
    """
    if shape not in get_args(Shape):
        raise BadInput(f"attn_shape={shape!r} is unknown; it is one of {', '.join(get_args(Shape))}")
    for name, value in (("attn_slice_x", slice_x), ("attn_slice_y", slice_y)):
        if value < SMALLEST:
            raise BadInput(f"{name}={value} must be at least {SMALLEST} tokens; 64 is usual")
    index %= 4
    if shape != "brick":
        quarter = index if shape == "shifted" else 0
        rows, columns = edges(height, _count(height, slice_y), quarter), edges(width, _count(width, slice_x), quarter)
        return grid(rows, columns)
    if index % 2 == 0:
        return _courses(height, width, slice_y, 2 * slice_x, index // 2)
    turned = _courses(width, height, slice_x, 2 * slice_y, index // 2)
    return [Rectangle(r.left, r.top, r.width, r.height) for r in turned]


def _count(length: int, piece: int) -> int:
    return -(-length // piece)


def _courses(height: int, width: int, course: int, brick: int, moved: int) -> list[Rectangle]:
    rows = edges(height, _count(height, course), 2 * moved)
    bricks = []
    for j, row in enumerate(pairwise(rows)):
        bricks += grid(list(row), edges(width, _count(width, brick), 2 * (j % 2) + moved))
    return bricks


def view_bricks(
    width: int,
    height: int,
    attn_slice_x: int = 64,
    attn_slice_y: int = 64,
    out_path: str | Path | None = None,
    attn_shape: Shape = "brick",
) -> Image:
    """A picture of the four tilings of an image of width x height pixels at its finest level (8 pixels a token).

    Tilings 0 1 above, 2 3 below, one colour a rectangle; also written to `out_path` as PNG. Raises BadInput.
    """
    from PIL import Image, ImageDraw

    if min(width, height) < 8:
        raise BadInput(f"{width}x{height} is too small to draw; a token is 8x8 pixels")
    across, down = width // 8, height // 8
    scale = max(1, 512 // max(across, down))
    picture = Image.new("RGB", (2 * across * scale + 8, 2 * down * scale + 8), "white")
    pen = ImageDraw.Draw(picture)
    for index in range(4):
        x0, y0 = (index % 2) * (across * scale + 8), (index // 2) * (down * scale + 8)
        for n, r in enumerate(get_bricks(across, down, index, attn_slice_x, attn_slice_y, attn_shape)):
            colour = colorsys.hsv_to_rgb(n * 0.618034 % 1, 0.55, 0.95)  # the golden ratio keeps neighbours apart
            left, top = x0 + r.left * scale, y0 + r.top * scale
            box = (left, top, left + r.width * scale - 1, top + r.height * scale - 1)
            pen.rectangle(box, fill=tuple(int(255 * c) for c in colour))
    if out_path is not None:
        with replacing(out_path) as temporary:
            picture.save(temporary, format="PNG")
    return picture


viewBricks = view_bricks  # LargeResPatch's name
