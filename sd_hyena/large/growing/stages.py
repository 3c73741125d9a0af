"""The sizes by which a picture grows from the model's own to the canvas."""

from __future__ import annotations

import math

STEP = 8  # pixels of a latent cell
LARGEST_FACTOR = 2.0  # of a side between two stages

Canvas = tuple[int, int]  # width, height in pixels


def times(canvas: Canvas, own: int) -> float:
    """How many times the side of the model's own square a canvas of the same shape has: of equal areas 1."""
    return math.sqrt(canvas[0] * canvas[1]) / own


def sizes(canvas: Canvas, own: int) -> list[Canvas]:
    """The canvases of all stages, the last one is `canvas`; one that the model draws by itself is the only one.

    The first has the area of the model's own square of `own` pixels a side and the canvas's shape; from each to the next
    a side grows by the same factor, at most two. Sides are multiples of 8 px, of at least 64.
    """
    factor = times(canvas, own)
    if factor <= 1:
        return [canvas]
    count = math.ceil(round(math.log(factor, LARGEST_FACTOR), 6))
    stages = [tuple(_whole(side * factor ** (i / count - 1)) for side in canvas) for i in range(count)]
    return [size for size in dict.fromkeys(stages) if size != canvas] + [canvas]


def _whole(side: float) -> int:
    return max(64, round(side / STEP) * STEP)
