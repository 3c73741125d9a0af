"""A drawing's progress, shown like all that is long."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from tqdm import tqdm

from sd_hyena.generate.watch import Watch
from sd_hyena.processes.progress import Work, work
from sd_hyena.processes.ranks import rank


class Bar(Watch):
    """One bar for all that one command draws; the first process shows it."""

    def __init__(self):
        self._open = ExitStack()
        self._shown: Work | None = None

    def begin(self, total: int) -> None:
        self.close()
        self._shown = self._open.enter_context(work("drawing", total, announced=False))

    def step(self, done: float, total: int, latents) -> None:
        if self._shown is None:
            self.begin(total)
        self._shown.to(done)

    def note(self, line: str) -> None:
        if rank() == 0:
            tqdm.write(line, file=sys.stdout)

    def close(self) -> None:
        """No more will come."""
        self._open.close()
        self._shown = None
