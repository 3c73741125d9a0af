"""Text files as people's editors leave them: UTF-8, or UTF-16 and 32 that say or show it; anything else is refused."""

from __future__ import annotations

import codecs
from pathlib import Path

from sd_hyena.errors import BadInput

MARKS = (  # longest first: one of UTF-16's begins one of UTF-32's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: str | Path) -> str:
    """Raises BadInput, which names the file and what to do."""
    try:
        return decoded(Path(path).read_bytes())
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise BadInput(f"{str(path)!r} is no {error.encoding.upper()} text ({byte}); save it as UTF-8") from None


def decoded(data: bytes) -> str:
    """The text of a whole file, its line ends as Python has them. Raises UnicodeDecodeError."""
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), _unmarked(data))
    return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def _unmarked(data: bytes) -> str:
    """UTF-16 shows itself: in most languages every other byte of many is zero, which UTF-8 has none of."""
    start = data[:512]
    for zeros, encoding in ((start[1::2], "utf-16-le"), (start[::2], "utf-16-be")):
        if len(data) % 2 == 0 and zeros.count(0) > len(start) / 5:
            return encoding
    return "utf-8"
