"""How far long work is, shown in one way everywhere: a bar where somebody watches, else a line every ten seconds.

What is begun within other work has no bar of its own: it is said beside the count of the outermost.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from sd_hyena.processes.ranks import rank

SELDOM = 10.0  # seconds between lines where there is no terminal
OFTEN = 0.5  # between looks at the count where there is one
BAR = "{percentage:3.0f}%|{bar:16}| {count} [{elapsed}<{left}] {desc}"  # the label is last: it is cut
NO_BAR = "[{elapsed}] {desc}"


class Work:
    """One piece of long work: `what` it is, of how many parts (None: nobody knows), `then` what becomes of it.

    `before` parts were done already.
    """

    def __init__(self, what: str, total: float | None = None, then: str = "", before: float = 0.0):
        self.what, self.total, self.then = what, total, then
        self.before = self.done = before
        self.beside = ""
        self.started = self._advanced = time.monotonic()
        self._advances = 0

    def to(self, done: float, beside: str | None = None) -> None:
        """So much is done; fractions are welcome. `beside` is said with it, until told otherwise."""
        if done != self.done:
            self._advances, self._advanced = self._advances + 1, time.monotonic()
            self.done = done  # last: another thread asks what is left
        self.beside = self.beside if beside is None else beside

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float | None:
        """Seconds to go, as far as can be told: at the rate until it last advanced, and less while it is about to again."""
        if not self.total or self.done <= self.before:
            return None
        spent = self._advanced - self.started
        since = min(time.monotonic() - self._advanced, spent / self._advances)
        return max((self.total - self.done) * spent / (self.done - self.before) - since, 0.0)

    def line(self, within: str = "") -> str:
        """Where it is, for a log."""
        left = self.left
        clock = f"{self.seconds_said(self.seconds)} so far" if left is None else f"{self.seconds_said(left)} left"
        parts = f"{self.count}, {clock}" if self.total else clock
        return f"{self.what}: {parts}{within}" + (f", then {self.then}" if self.then else "")

    @property
    def count(self) -> str:
        """3.25/7, of work with parts."""
        return f"{round(self.done, 2):.6g}/{self.total:.6g}"

    @staticmethod
    def seconds_said(seconds: float) -> str:
        """90 -> 1:30, 3700 -> 1:01:40."""
        return tqdm.format_interval(round(seconds)).removeprefix("0")


_open: list[Work] = []  # the outermost first


@contextmanager
def work(
    what: str, total: float | None = None, then: str = "", before: float = 0.0, announced: bool = True
) -> Iterator[Work]:
    """Announce a piece of long work and show how far it is for the time of the block; the first process alone does.

    What is not announced is not said in a log at all unless it takes long.
    """
    piece = Work(what, total, then, before)
    shown = not _open and rank() == 0
    _open.append(piece)
    try:
        if shown:
            with _bar(piece) if sys.stderr.isatty() else _lines(piece, announced):
                yield piece
        else:
            yield piece
    finally:
        _open.remove(piece)


class _Bar(tqdm):
    """Says of a piece of work what the piece says."""

    def __init__(self, piece: Work, **given: Any):
        self.piece = piece
        super().__init__(total=piece.total, initial=piece.before, **given)

    @property
    def format_dict(self) -> dict[str, Any]:
        left = self.piece.left
        said = {"left": "?" if left is None else Work.seconds_said(left)}
        return super().format_dict | said | ({"count": self.piece.count} if self.piece.total else {})


@contextmanager
def _bar(piece: Work) -> Iterator[None]:
    with _Bar(piece, bar_format=BAR if piece.total else NO_BAR, leave=False, **_size()) as bar:

        def show() -> None:
            bar.n = piece.done
            bar.set_description_str(piece.what + _within())

        show()
        with _every(OFTEN, show):
            yield
    _say_done(piece)


def _size() -> dict[str, int | bool]:
    """The terminal's, which changes; 80x24 where it does not say: tqdm would be silent there."""
    columns, lines = os.get_terminal_size(sys.stderr.fileno())
    return {"dynamic_ncols": True} if columns and lines else {"ncols": columns or 80, "nrows": lines or 24}


@contextmanager
def _lines(piece: Work, announced: bool) -> Iterator[None]:
    tell = lambda line: print(line, file=sys.stderr, flush=True)
    if announced:
        tell(f"{piece.what}, then {piece.then}" if piece.then else piece.what)
    with _every(SELDOM, lambda: tell(piece.line(_within()))):
        yield
    _say_done(piece)


def _say_done(piece: Work) -> None:
    if piece.seconds > SELDOM:
        print(f"{piece.what}: done in {Work.seconds_said(piece.seconds)}", file=sys.stderr, flush=True)


@contextmanager
def _every(seconds: float, show) -> Iterator[None]:
    """`show()` now and then, from a thread of its own: nothing that computes has to think of it."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(seconds):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _within() -> str:
    """What goes on within the outermost work."""
    said = [_open[0].beside] if _open and _open[0].beside else []
    for inner in _open[1:]:
        said.append(f"{inner.what} {inner.count}" if inner.total else inner.what)
    return f" ({'; '.join(said)})" if said else ""
