"""How far a long piece of work is: told to whoever asks, else shown as a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # of done and total; whatever it raises ends the work


@contextmanager
def bar(total: int, unit: str, progress: Progress | None = None) -> Iterator[Progress]:
    """`progress` itself, or a bar for the time of the block, where somebody watches."""
    if progress is not None:
        yield progress
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, disable=None, leave=False) as shown:
        yield lambda done, _total: shown.update(done - shown.n)
