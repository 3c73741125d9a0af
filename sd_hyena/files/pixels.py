"""The pixels of a picture of any of Pillow's modes, as eight bits a channel, by the range that they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sd_hyena.errors import BadInput

RANGES = 1, 255, 65535, 2**31 - 1  # what white is where a mode does not say: the first that holds all pixels
ORIENTATION, TURNED = 0x0112, range(5, 9)  # of EXIF: by a quarter, mirrored or not
ROUNDED = 1e-3  # by how much floats reach over their range


def read_pixels(path: str | Path) -> Any:
    """A PIL image, upright, L, LA, RGB or RGBA; of an animation the first frame. Raises BadInput.

    Also for a picture so large that it must be a bomb (Pillow's limit, 179 million pixels).
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return _eight_bits(ImageOps.exif_transpose(image))
    except BadInput:
        raise
    except Exception as error:  # Pillow's readers of formats raise whatever they stumble over
        raise BadInput(f"{str(path)!r} is no readable image ({' '.join(str(error).split())[:120]})") from None


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height of what `read_pixels` gives, its pixels not read where that is not needed. Raises BadInput."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception as error:  # as above
        raise BadInput(f"{str(path)!r} is no readable image ({' '.join(str(error).split())[:120]})") from None
    return (height, width) if turned else (width, height)


def _eight_bits(image: Any) -> Any:
    from PIL import Image

    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        return Image.fromarray(_to_range(np.asarray(image.convert("F")), mode))
    if mode == "LAB":
        return _from_lab(image)
    if image.has_transparency_data:
        grey = mode in ("LA", "La")
        plain = {"La": "LA", "RGBa": "RGBA"}.get(mode)  # colours that were multiplied by alpha
        image = image.convert(plain) if plain else image
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if mode in ("1", "L") else "RGB")


def _to_range(pixels: np.ndarray, mode: str) -> np.ndarray:
    """Grey of 16 or 32 bits, or floats, as uint8: 16 bits are what their mode says, the others by their largest pixel."""
    if not np.isfinite(pixels).all():
        raise ValueError("it holds pixels that are no numbers")
    largest = 65535 if mode.startswith("I;16") else float(pixels.max(initial=0))
    white = next((white for white in RANGES[mode != "F" :] if largest <= white * (1 + ROUNDED)), None)
    if white is None:
        raise ValueError(f"its brightest pixel is {largest:g}")
    return (pixels.clip(0, white) / white * 255).round().astype(np.uint8)


def _from_lab(image: Any) -> Any:
    from PIL import ImageCms

    lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
