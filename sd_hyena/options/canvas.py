"""How large a picture becomes: what is given, and what is left to the model or to the picture that it starts from."""

from __future__ import annotations

CELL = 8  # pixels of a latent one
SMALLEST = 64  # pixels of a side

Size = tuple[int, int]  # width and height in pixels


def canvas(width: int, height: int, own: Size, start: Size | None = None) -> Size:
    """A side of 0 is left open. Without a picture to start from the model's `own` size is taken for it; with one that
    side which keeps its shape.

    Where both are open the picture keeps its size, unless it has more pixels than the model's own size, or too few to draw.
    """
    if start is None:
        return width or own[0], height or own[1]
    if width and height:
        return width, height
    if width or height:
        return scaled(start, width / start[0] if width else height / start[1])
    fewer = min(1.0, (own[0] * own[1] / (start[0] * start[1])) ** 0.5)
    return scaled(start, max(fewer, SMALLEST / min(start)))


def scaled(size: Size, factor: float) -> Size:
    """A size times a factor, in whole cells."""
    return round(size[0] * factor / CELL) * CELL, round(size[1] * factor / CELL) * CELL
