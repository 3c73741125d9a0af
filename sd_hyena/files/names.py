"""Names of output files from a user's format, kept inside their folder and never overwriting."""

from __future__ import annotations

import glob
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import Formatter

from sd_hyena.errors import BadInput

RESERVED = re.compile(r"(?i)^(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[\d¹²³])\s*(\.|$)")  # devices on Windows
UNUSABLE = re.compile(r'[\x00-\x1f<>:"|?*\ud800-\udfff]|[. ]$')  # Windows drops dots and blanks at the end
LONGEST = 200  # bytes


def check_format(name_format: str, fields: str, option: str = "name_format") -> str:
    """Return the format if it is safe: only the one-letter `fields`, with specs like `05d`. Raises BadInput."""
    rule = f"use plain text and {' '.join('{' + f + '}' for f in fields)}, e.g. 'image_{{{fields[0]}:03d}}'"
    try:
        parts = list(Formatter().parse(name_format))
    except ValueError as error:
        raise BadInput(f"{option}={name_format!r}: {error}; {rule}") from None
    for _, field, spec, conversion in parts:
        if field is None:
            continue
        if len(field) != 1 or field not in fields or conversion or not re.fullmatch(r"(0?[1-9]\d?d?)?", spec or ""):
            raise BadInput(
                f"{option}={name_format!r}: the field {{{field}{':' + spec if spec else ''}}} is not known; {rule}"
            )
    sample = name_format.format(**dict.fromkeys(fields, 0))
    names = sample.replace("\\", "/").split("/")
    if not sample or sample.startswith("/") or any(part in ("", "..", ".") for part in names):
        raise BadInput(f"{option}={name_format!r} must stay inside the output folder; {rule}")
    if any(RESERVED.match(part) or UNUSABLE.search(part) for part in names) or len(sample.encode()) > LONGEST:
        raise BadInput(f"{option}={name_format!r} is no portable file name of at most {LONGEST} characters; {rule}")
    return name_format


def next_number(folder: Path, name_format: str, field: str = "n") -> int:
    """The first value of a field above those that the names of this format have in the folder; 0 if there are none."""
    wanted, found = "", ""
    for text, name, *_ in Formatter().parse(name_format):
        wanted += glob.escape(text) + ("*" if name else "")
        once = rf" *(?P<{field}>\d+)" if name == field and "?P" not in found else ".+"
        found += re.escape(text) + (once if name else "")
    pattern = re.compile(rf"{found}(-\d+|-compare)*\.\w+")
    if "?P" not in found:
        return 0
    names = (path.relative_to(folder).as_posix() for path in folder.glob(f"{wanted}.*"))
    return max((int(match[field]) + 1 for name in names if (match := pattern.fullmatch(name))), default=0)


def free_path(folder: Path, name: str, suffix: str) -> Path:
    """`folder/name.suffix`, or `name-1`, `name-2` ... if that is taken."""
    path, number = folder / f"{name}{suffix}", 0
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}{suffix}"
    return path


def for_a_shell(name: str | Path) -> str:
    """A file's name as it can be pasted behind a command."""
    name = str(name)
    return shlex.quote(f"./{name}" if name.startswith("-") else name)


def writable_folder(path: str | Path, option: str = "out_dir") -> Path:
    """Make the folder and prove that a file can be written there. Raises BadInput."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(f"{option}={str(path)!r} cannot be written to ({reason}); name a folder you own") from None
    return folder


@contextmanager
def own_folder(path: str | Path, option: str = "out_dir") -> Iterator[Path]:
    """The same for the time of a block; what it made of folders and left empty is taken away again. Raises BadInput."""
    place = Path(path)
    made = [folder for folder in (place, *place.parents) if not os.path.lexists(folder)]
    try:
        yield writable_folder(place, option)
    finally:
        for folder in made:
            with suppress(OSError):  # it is not empty, or was never made
                folder.rmdir()
