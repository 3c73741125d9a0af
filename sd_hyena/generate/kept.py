"""What stays loaded from one drawing to the next, and is let go before anything else takes its place."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from sd_hyena.processes.memory import release


def stamp(path: str | Path) -> tuple[Hashable, ...]:
    """Tells a file, or a folder with all below, from what lay there before: names, times of change, sizes."""
    path = Path(path).resolve()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(file, file.stat()) for file in files if file.exists()]
    return path, *((str(file), seen.st_mtime_ns, seen.st_size) for file, seen in found)


class Kept:
    """Values by key. Each is entered when it is first asked for, and exited when it is let go, the last one first."""

    def __init__(self):
        self._values: dict[Hashable, tuple[Any, ExitStack]] = {}
        weakref.finalize(self, _let_go, self._values, frozenset())  # before Python itself is taken apart

    def only(self, keys: Iterable[Hashable]) -> None:
        """Let go of all others, and of their memory."""
        if _let_go(self._values, frozenset(keys)):
            release()

    def get(self, key: Hashable, make: Callable[[], AbstractContextManager[Any]]) -> Any:
        """The value of a key; made by `make` if there is none yet."""
        if key not in self._values:
            with ExitStack() as stack:
                value = stack.enter_context(make())
                self._values[key] = value, stack.pop_all()
        return self._values[key][0]


def _let_go(values: dict[Hashable, tuple[Any, ExitStack]], keys: frozenset[Hashable]) -> bool:
    going = [key for key in reversed(values) if key not in keys]
    for key in going:
        values.pop(key)[1].close()
    return bool(going)
