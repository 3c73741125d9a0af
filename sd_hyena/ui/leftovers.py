"""What the page's memory holds that nobody asks for any more: old uploads, painted masks, regions that were looked at, small pictures."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.yaml_file import read_documents

OLD = 86400  # seconds after which what nothing names goes
PLACES = ("uploads", "regions", "small")


def tidy(state: Path, settings: Iterable[Path], age: float = OLD) -> list[Path]:
    """Delete the files in the page's own places that are older than `age` and that none of the settings, which are YAML
    files, names; nor do the regions that these name. Returns what was deleted."""
    named = {os.path.realpath(text) for path in settings for text in _texts(_read(path))}
    for path in (state / "regions").glob("*.json"):
        if os.path.realpath(path) in named:
            named |= {os.path.realpath(text) for text in _texts(_read(path))}
    gone, now = [], time.time()
    for path in (path for place in PLACES for path in (state / place).rglob("*")):
        with suppress(OSError):
            found = path.lstat()
            old = now - max(found.st_mtime, found.st_ctime) > age
            if old and not path.is_dir() and os.path.realpath(path) not in named:
                path.unlink()
                gone.append(path)
    for folder in {path.parent for path in gone} - {state / place for place in PLACES}:
        with suppress(OSError):  # of one that still holds something
            folder.rmdir()
    return gone


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8")) if path.suffix == ".json" else read_documents(str(path))
    except (OSError, ValueError, BadInput):
        return None


def _texts(value: Any) -> Iterator[str]:
    """All that may be a path, in the editor's regions and in lists between commas too."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str) and value[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            yield from _texts(json.loads(value))
    elif isinstance(value, str) and "\0" not in value:
        yield from {value, *value.split(",")}
