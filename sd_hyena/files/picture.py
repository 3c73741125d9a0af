"""Pictures that explain themselves: A1111's `parameters` for other programs, our whole config for us.

In PNG both are chunks of text; in JPEG and WebP the first is EXIF's user comment, as A1111 has it, the second its description.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.names import free_path
from sd_hyena.files.picture_text import DESCRIPTION, EXIF, OURS, USER_COMMENT, read_texts
from sd_hyena.files.pixels import read_pixels

LOSSY = {
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "quality": 95, "method": 4},
}
LARGEST_EXIF = 65_533 - len(b"Exif\0\0")  # bytes in a segment of a JPEG


def write_image(path: Path, image: Any, text: str, metadata: dict[str, Any]) -> Path:
    """Write a PIL image with what repeats it, all or nothing, at `path` or where that is taken at the next free number.

    The suffix says how: .png, .webp or .jpg. A JPEG holds 64 KB of text; what has more is written as .png.
    """
    texts = {"parameters": text, "sd_hyena": json.dumps(metadata) if metadata else ""}
    texts = {name: _printable(text) for name, text in texts.items() if text}
    exif = _exif(texts) if path.suffix in LOSSY else b""
    if path.suffix == ".jpg" and len(exif) > LARGEST_EXIF:
        path = path.with_suffix(".png")
    if path.suffix not in LOSSY:
        return write_png(path, image, texts)
    return _placed(path, image, **LOSSY[path.suffix], exif=exif)


def write_png(path: Path, image: Any, texts: Mapping[str, str]) -> Path:
    """Write a PIL image with texts by name, all or nothing, at `path` or where that is taken at the next free number."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, _printable(text))
    return _placed(path, image, format="PNG", pnginfo=chunks)


def _placed(path: Path, image: Any, **how: Any) -> Path:
    placed: list[Path] = []
    with replacing(path, put=lambda temporary, wanted: placed.append(_put_beside(temporary, wanted))) as temporary:
        image.save(temporary, **how)
    return placed[0]


def _printable(text: str) -> str:
    """Without zeros, and names that are no Unicode spelt out."""
    return text.replace("\0", "").encode("utf-8", "backslashreplace").decode()


def _exif(texts: Mapping[str, str]) -> bytes:
    from PIL.Image import Exif

    exif = Exif()
    if "sd_hyena" in texts:
        exif[DESCRIPTION] = OURS + texts["sd_hyena"]
    if "parameters" in texts:
        exif.get_ifd(EXIF)[USER_COMMENT] = b"UNICODE\0" + texts["parameters"].encode("utf-16-be")
    return exif.tobytes()


def _put_beside(temporary: Path, wanted: Path) -> Path:
    while True:
        path = free_path(wanted.parent, wanted.stem, wanted.suffix)
        try:
            os.link(temporary, path)  # unlike a rename it fails if another process was faster
            return path
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
            return path


def read_picture(path: str | Path) -> Any:
    """A PIL image as `read_pixels` has it, RGB; what is transparent is white. Raises BadInput."""
    from PIL import Image

    image = read_pixels(path)
    if image.mode.endswith("A"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What `write_image` was given as metadata; empty for an image of somebody else. Raises BadInput."""
    return metadata_of(read_texts(path), path)


def metadata_of(texts: dict[str, str], path: str | Path) -> dict[str, Any]:
    """The same from the texts of the picture at `path`. Raises BadInput."""
    try:
        stored = json.loads(texts.get("sd_hyena") or "{}")
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} has damaged metadata ({str(error)[:120]})") from None
    if not isinstance(stored, dict):
        raise BadInput(f"{str(path)!r} has damaged metadata (no mapping)")
    return stored
