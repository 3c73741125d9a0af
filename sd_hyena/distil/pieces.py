"""Pieces of slow work, kept one by one: what was done once is on disk, whatever ends the run.

FOLDER/NAME.safetensors   each by itself
FOLDER.lock               held by the run that makes them; the system frees it when that run ends, however it does
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.weights import read_weights
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.progress import Work, work
from sd_hyena.processes.ranks import say

Piece = dict[str, Tensor]  # on the CPU
Make = Callable[[range, Work], list[Piece]]  # the pieces of these numbers; tells the work how far it is
Check = Callable[[Piece], None]  # raises for what is no such piece
SUM = "crc32"  # of the numbers, among a file's metadata: its header alone would not tell of a flipped bit


class Pieces:
    """Those of these `names` in a folder."""

    def __init__(self, folder: Path, names: Sequence[str], check: Check):
        self.folder, self.count, self.check = folder, len(names), check
        self.files = [folder / f"{name}.safetensors" for name in names]

    @property
    def missing(self) -> int:
        """How many have yet to be made."""
        return sum(not file.exists() for file in self.files)

    def get(self, make: Make, at_once: int, what: str) -> list[Piece]:
        """All of them: read, or made `at_once` at a time and kept; `what` says so. Half as many after an out-of-memory.

        Another run that makes some of the same folder is waited for.
        """
        found = None if self.missing else self._found()
        if found is None or len(found) < self.count:
            with self._alone():
                found = self._made(make, at_once, what, self._found() if found is None else found)
        return [found[i] for i in range(self.count)]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """The folder is there, and one run at a time makes what belongs there."""
        lock = FileLock(self.folder.with_suffix(".lock"))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with work("another run makes the same pictures: waiting for it"):
                lock.acquire()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # whoever held the lock may have taken it away
            yield
        finally:
            lock.release()
        with suppress(OSError):  # Windows takes away no file that is open, here or in another run that waits
            Path(lock.lock_file).unlink()

    def _made(self, make: Make, at_once: int, what: str, found: dict[int, Piece]) -> dict[int, Piece]:
        """All by number, where some are `found`."""
        first, tried_alone = 0, False
        with work(what, self.count, f"kept in {self.folder.parent}", len(found)) as shown:
            while first < self.count:
                rows = range(first, min(first + at_once, self.count))
                if not found.keys() >= set(rows):
                    made = _tried(make, rows, shown, may_fail=not tried_alone)
                    if made is None:
                        tried_alone, at_once = at_once == 1, max(at_once // 2, 1)
                        say(f"out of memory: going on with {at_once} at once")
                        release()
                        continue
                    tried_alone = False
                    for i, piece in zip(rows, made, strict=True):
                        if i not in found:
                            self._keep(i, piece)
                            found[i] = piece
                first = rows.stop
                shown.to(len(found))
        return found

    def _keep(self, i: int, piece: Piece) -> None:
        write_piece(self.files[i], piece)

    def _found(self) -> dict[int, Piece]:
        """What is there of them, in memory of its own: where a file is mapped, a CPU's sums differ in the last bit."""
        pieces = {i: read_piece(file, self.check) for i, file in enumerate(self.files)}
        return {i: {k: value.clone() for k, value in piece.items()} for i, piece in pieces.items() if piece is not None}


def write_piece(path: Path, piece: Piece) -> None:
    """All or nothing."""
    piece = {name: value.contiguous() for name, value in piece.items()}
    with replacing(path) as temporary:
        save_file(piece, temporary, {SUM: _sum(piece)})


def read_piece(path: Path, check: Check) -> Piece | None:
    """What a file holds, None if there is none; damaged, it is as good as nothing, and that is said."""
    if not path.exists():
        return None
    try:
        piece, metadata = read_weights(path)
        if metadata.get(SUM, "") not in ("", _sum(piece)):  # older ones have no sum
            raise BadInput("its numbers are not those that were written")
        check(piece)
        return piece
    except Exception as error:  # of a file that something else wrote there
        say(f"note: {str(path)!r} is damaged ({str(error)[:160]}); it is made again")
        return None


def _sum(piece: Piece) -> str:
    total = 0
    for name in sorted(piece):
        total = zlib.crc32(piece[name].contiguous().flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def _tried(make: Make, rows: range, shown: Work, may_fail: bool) -> list[Piece] | None:
    """None after an out-of-memory, if it may fail by that."""
    try:
        return make(rows, shown)
    except RuntimeError as error:
        if not (is_out_of_memory(error) and may_fail):
            raise
        return None
