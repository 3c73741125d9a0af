"""How far a long piece of work is: told to whoever asks, else shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sd_hyena.processes.progress import work

Progress = Callable[[int, int], None]  # of done and total; whatever it raises ends the work


@contextmanager
def bar(total: int, unit: str, progress: Progress | None = None) -> Iterator[Progress]:
    """`progress` itself, or a bar for the time of the block."""
    if progress is not None:
        yield progress
        return
    with work(unit, total, announced=False) as shown:
        yield lambda done, _total: shown.to(done)
