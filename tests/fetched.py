"""What tests fetch into a cache once and never install: packages that the program itself can do without."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(os.environ.get("SD_HYENA_TEST_CACHE") or Path.home() / ".cache" / "sd_hyena")


class NotToBeHad(Exception):
    """It is not in the cache and cannot be fetched."""


def pip(*arguments: str) -> None:
    """Raises NotToBeHad."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotToBeHad(f"pip says: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]}")


def kept(name: str, fetch: Callable[[Path], Path]) -> Path:
    """The folder of this name in the cache; where there is none `fetch` makes one within an empty folder, and says where.

    Raises NotToBeHad.
    """
    folder = CACHE / name
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=CACHE) as temporary,
        contextlib.suppress(OSError),
    ):  # another process was faster
        fetch(Path(temporary)).rename(folder)
    return folder
