"""What a training makes its bank of, kept piece by piece until all of it is there, then as one file.

NAME.safetensors               all pieces
NAME.parts/00007.safetensors   each by itself, until all are there
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch

from sd_hyena.distil.pieces import Make, Piece, Pieces, read_piece, write_piece
from sd_hyena.errors import BadInput
from sd_hyena.processes.ranks import say


class Kept(Pieces):
    """`count` pictures at a path of suffix .safetensors: clean latents of `shape`, or with `states` several noisy ones.

    A piece is "latents" (S, 4, h, w) of one picture; if they are noisy, with their "timesteps" (S,). As a whole they are
    "latents" (S N, 4, h, w), the first of each picture, then the second; and with `states` the "timesteps" (S N,) and the
    "picture" (S N,) of each.
    """

    def __init__(self, path: Path, count: int, shape: tuple[int, ...], states: bool = False):
        self.path, self.shape, self.states = path, shape, states
        of_one = partial(self._check, names={"latents", "timesteps"}, count=1)
        super().__init__(path.with_suffix(".parts"), [f"{i:05d}" for i in range(count)], of_one)

    @property
    def missing(self) -> int:
        """How many have yet to be made."""
        return 0 if self.path.exists() else super().missing

    def get(self, make: Make, at_once: int, what: str) -> Piece:
        """All of them as one: read, or made as pieces are; whatever ends it, it is said how many are kept."""
        if (whole := self._whole()) is not None:
            return whole
        with self._alone():
            try:
                if not self.path.exists() or (whole := self._whole()) is None:
                    whole = self._joined(make, at_once, what)
                shutil.rmtree(self.folder, ignore_errors=True)
            except BaseException:
                kept = self.count - self.missing
                say(f"{kept} of {self.count} pictures are kept; the same command goes on from there")
                raise
        return whole

    def _joined(self, make: Make, at_once: int, what: str) -> Piece:
        found = self._found()
        if found:
            say(f"{len(found)} of {self.count} pictures were kept by a run that was ended; going on from there")
        found = self._made(make, at_once, what, found)
        whole = {name: torch.stack([found[i][name] for i in range(self.count)], 1).flatten(0, 1) for name in found[0]}
        if self.states:
            whole["picture"] = torch.arange(self.count).repeat(len(whole["latents"]) // self.count)
        write_piece(self.path, whole)
        return whole

    def _keep(self, i: int, piece: Piece) -> None:
        if not piece["latents"].isfinite().all():
            raise FloatingPointError("the teacher drew NaN; use --dtype bfloat16 or float32")
        super()._keep(i, piece)

    def _whole(self) -> Piece | None:
        return read_piece(self.path, partial(self._check, names={"latents", "timesteps", "picture"}, count=self.count))

    def _check(self, piece: Piece, names: set[str], count: int) -> None:
        """Raise BadInput for what is not `count` pictures."""
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
