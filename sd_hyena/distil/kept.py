"""Slow work whose pieces are kept one by one: what was done once is on disk, whatever ends the run.

NAME.safetensors               all pieces
NAME.parts/00007.safetensors   each by itself, until all are there
NAME.lock                      held by the run that makes them; the system frees it when that run ends, however it does
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
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

Piece = dict[str, Tensor]  # "latents" (S, 4, h, w) of one picture; if they are noisy, their "timesteps" (S,)
Make = Callable[[range, Work], list[Piece]]  # the pieces of these numbers; tells the work how far it is


class Kept:
    """`count` pictures at a path of suffix .safetensors: clean latents of `shape`, or with `states` several noisy ones.

    As a whole they are "latents" (S N, 4, h, w), the first of each picture, then the second; and with `states` the
    "timesteps" (S N,) and the "picture" (S N,) of each.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...], states: bool = False):
        self.path, self.count, self.shape, self.states = path, count, shape, states
        self.parts = path.with_suffix(".parts")

    @property
    def missing(self) -> int:
        """How many have yet to be made."""
        return 0 if self.path.exists() else self.count - len(list(self.parts.glob("*.safetensors")))

    def get(self, make: Make, at_once: int, what: str) -> Piece:
        """All of them: read, or made `at_once` at a time and kept; `what` says so. Half as many after an out-of-memory.

        Another run that makes the same ones is waited for. Whatever ends it, it is said how many are kept.
        """
        whole = self._whole()
        if whole is not None:
            return whole
        lock = FileLock(self.path.with_suffix(".lock"))
        self.parts.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            with work("another run makes the same pictures: waiting for it"):
                lock.acquire()
        self.parts.mkdir(parents=True, exist_ok=True)  # whoever held the lock may have taken it away
        try:
            if not self.path.exists() or (whole := self._whole()) is None:
                whole = self._made(make, at_once, what)
            shutil.rmtree(self.parts, ignore_errors=True)
        except BaseException:
            kept = self.count - self.missing
            say(f"{kept} of {self.count} pictures are kept; the same command goes on from there")
            raise
        finally:
            lock.release()
        with suppress(OSError):  # Windows takes away no file that is open, here or in another run that waits
            Path(lock.lock_file).unlink()
        return whole

    def _made(self, make: Make, at_once: int, what: str) -> Piece:
        found = self._found()
        if found:
            say(f"{len(found)} of {self.count} pictures were kept by a run that was ended; going on from there")
        first, tried_alone = 0, False
        with work(what, self.count, f"kept in {self.path.parent}", len(found)) as shown:
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
        whole = {name: torch.stack([found[i][name] for i in range(self.count)], 1).flatten(0, 1) for name in found[0]}
        if self.states:
            whole["picture"] = torch.arange(self.count).repeat(len(whole["latents"]) // self.count)
        with replacing(self.path) as temporary:
            save_file(whole, temporary)
        return whole

    def _keep(self, i: int, piece: Piece) -> None:
        if not piece["latents"].isfinite().all():
            raise FloatingPointError("the teacher drew NaN; use --dtype bfloat16 or float32")
        with replacing(self.parts / f"{i:05d}.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in piece.items()}, temporary)

    def _found(self) -> dict[int, Piece]:
        parts = {
            i: self._read(self.parts / f"{i:05d}.safetensors", {"latents", "timesteps"}) for i in range(self.count)
        }
        return {i: piece for i, piece in parts.items() if piece is not None}

    def _whole(self) -> Piece | None:
        return self._read(self.path, {"latents", "timesteps", "picture"}, self.count)

    def _read(self, path: Path, names: set[str], count: int = 1) -> Piece | None:
        """What `count` pictures are, or None; damaged, it is as good as nothing."""
        if not path.exists():
            return None
        try:
            piece = read_weights(path)[0]
            latents = piece["latents"]
            if latents.shape[1:] != self.shape or not latents.isfinite().all():
                raise BadInput("it does not hold what was made")
            if piece.keys() != (names if self.states else {"latents"}):
                raise BadInput("its states are not those of its pictures")
            if any(len(value) != len(latents) for value in piece.values()):
                raise BadInput("its states are not those of its pictures")
            pictures = piece["picture"] if "picture" in piece else torch.arange(count)
            if len(latents) % count or sorted(set(pictures.tolist())) != list(range(count)):
                raise BadInput("it does not hold all pictures")
            if not self.states and len(latents) != count:
                raise BadInput("it does not hold all pictures")
            return piece
        except Exception as error:  # of a file that something else wrote there
            say(f"note: {str(path)!r} is damaged ({str(error)[:160]}); it is made again")
            return None


def _tried(make: Make, rows: range, shown: Work, may_fail: bool) -> list[Piece] | None:
    """None after an out-of-memory, if it may fail by that."""
    try:
        return make(rows, shown)
    except RuntimeError as error:
        if not (is_out_of_memory(error) and may_fail):
            raise
        return None
