"""A picture put into a frame of another shape: what goes over is cut, or what is missing is filled, or it is stretched."""

from __future__ import annotations

from typing import Any, Literal

Resize = Literal["crop", "fit", "stretch"]
Size = tuple[int, int]  # width and height


def same_shape(a: Size, b: Size) -> bool:
    """Whether two sizes have one shape, but for a pixel's rounding."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= max(*a, *b)


def framed(image: Any, size: Size, resize: Resize, rest: int | None = None) -> Any:
    """A PIL image at `size`, resampled by Lanczos. `crop` takes its middle; `fit` keeps all of it and fills what is left on
    two sides with the colour `rest`, without one with the pixels at its edges."""
    import numpy as np
    from PIL import Image, ImageOps

    lanczos = Image.Resampling.LANCZOS
    if resize == "stretch" or same_shape(image.size, size):
        return image.resize(size, lanczos)
    if resize == "crop":
        return ImageOps.fit(image, size, lanczos)
    factor = min(size[0] / image.width, size[1] / image.height)
    inner = [max(1, min(side, round(own * factor))) for own, side in zip(image.size, size, strict=True)]
    image = image.resize(inner, lanczos)
    around = [((side - own) // 2, side - own - (side - own) // 2) for own, side in zip(inner, size, strict=True)]
    around = [around[1], around[0], *[(0, 0)] * (len(image.getbands()) > 1)]
    how = {"mode": "edge"} if rest is None else {"constant_values": rest}
    return Image.fromarray(np.pad(np.asarray(image), around, **how))
