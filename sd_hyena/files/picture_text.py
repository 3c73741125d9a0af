"""The texts that a picture carries: PNG's chunks, and of JPEG, WebP and the like what EXIF has in their place."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput

LARGEST_TEXT = 1 << 22  # bytes of a PNG text chunk that we read
EXIF, USER_COMMENT = 0x8769, 0x9286
DESCRIPTION, OURS = 0x010E, "sd_hyena:"  # where our own text is, and how it begins
MAKER_TAGS = range(
    0x0100, 0x0111
)  # where ComfyUI puts "prompt:..." and "workflow:..." into a WebP, from Model downwards
DAMAGE = (ValueError, SyntaxError, LookupError, TypeError, ArithmeticError, AttributeError, EOFError, struct.error)


def read_texts(path: str | Path) -> dict[str, str]:
    """Texts by the names that PNGs have for them; a user comment of EXIF is A1111's `parameters`. Raises BadInput.

    Only headers are read, so a picture may be of any size.
    """
    from PIL import Image, PngImagePlugin

    largest, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, LARGEST_TEXT
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # only the header is read, and ours may be 16384²
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            texts = {name: text for name, text in image.info.items() if isinstance(text, str)}
            return _of_exif(image) | texts
    except OSError as error:
        raise BadInput(f"{str(path)!r} is no readable image ({error.strerror or 'unknown format'})") from None
    except DAMAGE as error:
        raise BadInput(f"{str(path)!r} has damaged metadata ({' '.join(str(error).split())[:120]})") from None
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS = largest, limit


def _of_exif(image: Any) -> dict[str, str]:
    if image.format == "PNG" and "exif" not in image.info:
        return {}  # where Pillow would decode the whole picture to look behind it
    exif, texts = image.getexif(), {}
    for tag in MAKER_TAGS:
        name, colon, value = str(exif.get(tag, "")).partition(":")
        if colon and name in ("prompt", "workflow"):
            texts[name] = value.rstrip("\0")
    if str(own := exif.get(DESCRIPTION, "")).startswith(OURS):
        texts["sd_hyena"] = own.removeprefix(OURS).rstrip("\0")
    comment = exif.get_ifd(EXIF).get(USER_COMMENT) or image.info.get("comment")  # of a GIF, or a JPEG without EXIF
    if isinstance(comment, bytes | str) and comment:
        texts["parameters"] = user_comment(comment)
    return texts


def user_comment(comment: bytes | str) -> str:
    """The text of a user comment, which begins with eight bytes for its encoding, or with itself.

    UNICODE means UTF-16, in either order of bytes; A1111 writes the large one first. Without a mark that order is
    taken in which the Latin letters are, and UTF-8 if there are no halves to tell apart.
    """
    content = comment.encode("latin-1", "replace") if isinstance(comment, str) else comment
    code, body = content[:8], content[8:]
    if code == b"UNICODE\0":
        return _utf16(body).rstrip("\0")
    if code not in (b"ASCII\0\0\0", b"JIS\0\0\0\0\0", bytes(8)):
        if isinstance(comment, str):
            return comment
        body = content
    try:
        return body.decode("utf-8-sig").rstrip("\0")
    except UnicodeDecodeError:
        return body.decode("latin-1").rstrip("\0")


def _utf16(body: bytes) -> str:
    if body[:2] in (b"\xfe\xff", b"\xff\xfe"):
        return body.decode("utf-16", "replace")
    if b"\0" not in body:
        return body.decode("utf-8", "replace")
    order = "be" if body[::2].count(0) >= body[1::2].count(0) else "le"
    return body.decode(f"utf-16-{order}", "replace")
