"""A drawing's progress in a terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from sd_hyena.generate.watch import Watch
from sd_hyena.processes.ranks import rank


class Bar(Watch):
    """One bar for all that one command draws; the first process shows it, where somebody watches."""

    def __init__(self):
        self._bar: tqdm | None = None

    def step(self, done: float, total: int, latents) -> None:
        if self._bar is None:
            form = "{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total} steps [{elapsed}<{remaining}]"
            self._bar = tqdm(total=total, disable=True if rank() else None, bar_format=form)
        self._bar.update(done - self._bar.n)

    def note(self, line: str) -> None:
        if rank() == 0:
            tqdm.write(line, file=sys.stdout)

    def close(self) -> None:
        """No more will come."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
