"""PNG files that explain themselves: an A1111 `parameters` chunk for other programs, our whole config for us."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.names import free_path
from sd_hyena.files.picture_text import read_texts
from sd_hyena.files.pixels import read_pixels


def write_image(path: Path, image: Any, text: str, metadata: dict[str, Any]) -> Path:
    """Write a PIL image as PNG with what repeats it, as `write_png`."""
    return write_png(path, image, {"parameters": text, "sd_hyena": json.dumps(metadata)})


def write_png(path: Path, image: Any, texts: Mapping[str, str]) -> Path:
    """Write a PIL image with texts by name, all or nothing, at `path` or where that is taken at the next free number."""
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, text.replace("\0", ""))
    placed: list[Path] = []
    with replacing(path, put=lambda temporary, wanted: placed.append(_put_beside(temporary, wanted))) as temporary:
        image.save(temporary, format="PNG", pnginfo=chunks)
    return placed[0]


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
