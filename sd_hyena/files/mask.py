"""A mask out of a picture: grey, white where something is to happen, and what of the picture was taken for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sd_hyena.files.pixels import read_pixels

SAME = 8  # of 255: colours so near are one


def read_mask(path: str | Path) -> tuple[Any, str]:
    """The mask, a PIL image of mode L, and how transparency was read; empty if there is none. Raises BadInput.

    A brush on nothing: what is opaque is white. Grey with transparency: the grey, on black. A picture out of which
    something was erased: that is white.
    """
    from PIL import Image

    image = read_pixels(path)
    grey = np.asarray(image.convert("L"))
    if not image.mode.endswith("A"):
        return Image.fromarray(grey), ""
    rgba = np.asarray(image.convert("RGBA")).astype(int)
    alpha, seen = rgba[..., 3], rgba[rgba[..., 3] > 0, :3]
    if alpha.min() == alpha.max():
        return Image.fromarray(grey), ""
    if (np.ptp(seen, axis=0) <= SAME).all():
        mask, said = alpha, "its opacity, for its colour is one: what is opaque is white"
    elif (np.ptp(seen, axis=1) <= SAME).all():
        mask, said = (grey * (alpha / 255)).round(), "its grey: what is transparent is black"
    else:
        mask, said = 255 - alpha, "its transparency, for it is a picture: what was erased is white"
    return Image.fromarray(mask.astype(np.uint8)), f"note: the mask {str(path)!r} is read by {said}"
