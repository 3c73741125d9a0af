"""Pictures side by side in a labelled grid: a row for each prompt, a column for each way of drawing it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CELL = 512  # pixels of the longest side of a picture in it
LARGEST = 12_000  # pixels of a side of the whole
MARGIN, FONT, NARROWEST = 8, 16, 128  # pixels
LINES = 8  # of a label


def grid(pictures: Mapping[tuple[int, int], Callable[[], Any]], rows: Sequence[str], columns: Sequence[str]) -> Any:
    """A PIL image of the pictures by (row, column), opened one after the other; a place may stay empty.

    rows, columns: their labels. Larger pictures are made smaller, all by one factor.
    """
    from PIL import Image, ImageDraw, ImageFont

    most = max(len(rows), len(columns))
    sizes = {place: open_().size for place, open_ in pictures.items()}
    factor = min(1.0, min(CELL, LARGEST // most) / max(max(size) for size in sizes.values()))
    cells = {place: [max(1, round(side * factor)) for side in size] for place, size in sizes.items()}
    font = ImageFont.load_default(FONT)
    letter = font.getlength("n")
    fits = lambda text, width: "\n".join(textwrap.wrap(text, max(4, int((width - MARGIN) / letter)))[:LINES])
    lines = lambda text: (FONT + 4) * (text.count("\n") + 1)
    widths = [max((w for (_, c), (w, _) in cells.items() if c == column), default=1) for column in range(len(columns))]
    widths = [max(width, NARROWEST) for width in widths]
    beside = min(max(widths), 2 * NARROWEST)  # the labels of rows
    above = [fits(text, width) for text, width in zip(columns, widths, strict=True)]
    labels = [fits(text, beside) for text in rows]
    heights = [
        max(lines(text), *(h for (r, _), (_, h) in cells.items() if r == row), 0) for row, text in enumerate(labels)
    ]
    top, left = MARGIN + max(map(lines, above)), beside + MARGIN
    size = left + sum(widths) + MARGIN * len(widths), top + sum(heights) + MARGIN * len(heights)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    x, places = left, []
    for text, width in zip(above, widths, strict=True):
        pen.text((x, MARGIN // 2), text, fill="black", font=font)
        places.append(x)
        x += width + MARGIN
    y = top
    for row, (text, height) in enumerate(zip(labels, heights, strict=True)):
        pen.text((MARGIN, y), text, fill="black", font=font)
        for column, x in enumerate(places):
            if (row, column) in pictures:
                picture = pictures[row, column]().convert("RGB")
                canvas.paste(picture.resize(cells[row, column], Image.Resampling.LANCZOS), (x, y))
        y += height + MARGIN
    return canvas
