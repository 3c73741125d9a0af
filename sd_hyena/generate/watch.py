"""Who watches a drawing, and can end it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sd_hyena.processes.ranks import say

if TYPE_CHECKING:
    from torch import Tensor


class Cancelled(Exception):
    """Whoever watches wanted no more. What is done is done; the engine can go on with something else."""


class Watch:
    """Told how far a drawing is, and asked whether to go on; override what you need.

    Both happen at every denoising step, every batch of tiles and every tile of the VAE.
    """

    def begin(self, total: int) -> None:
        """So many steps are to come, the first of which may take long."""

    def step(self, done: float, total: int, latents: Tensor | None) -> None:
        """`done` of `total` steps, in fractions where a step has tiles; latents (B, 4, h, w) as the last step left them.

        The VAE counts as a step of each image, and so does each step of a noise inversion.
        """

    def cancelled(self) -> bool:
        """Whether to end: within a tile Cancelled is raised, out of `Engine.draw`."""
        return False

    def drawing(self, line: str) -> None:
        """What is going to be drawn."""
        self.note(line)

    def note(self, line: str) -> None:
        """Something that whoever asked for the picture should know."""
        say(line)


class Unannounced(Watch):
    """For one of many drawings that are announced together."""

    def drawing(self, line: str) -> None:
        """Not said."""


class Part(Watch):
    """Tells another watch of one of several drawings, which count alike."""

    def __init__(self, whole: Watch, number: int, of: int):
        self._whole, self._number, self._of = whole, number, of

    def begin(self, total: int) -> None:
        if self._number == 0:
            self._whole.begin(self._of * 100)

    def step(self, done: float, total: int, latents: Tensor | None) -> None:
        self._whole.step((self._number + done / total) * 100, self._of * 100, latents)

    def cancelled(self) -> bool:
        return self._whole.cancelled()

    def note(self, line: str) -> None:
        self._whole.note(line)


class Advance:
    """Counts the steps of one drawing for a watch. Raises Cancelled where it is told what happens."""

    def __init__(self, watch: Watch, total: int):
        self.watch, self.total = watch, total
        self.done, self.worth = 0.0, 1.0  # steps that are done; what the piece of work at hand is worth
        self._told = 0.0
        self.latents: Tensor | None = None
        watch.begin(total)

    def within(self, done: int, total: int) -> None:
        """So much of the piece of work at hand is done; one whose parts have parts is never told to go back."""
        self._told = max(self._told, self.done + self.worth * done / total)
        self._tell(self._told)

    def to(self, done: float, latents: Tensor | None = None) -> None:
        """So many steps are done in all; what comes next is worth what this piece was, until told otherwise."""
        self.done = self._told = done
        self.latents = self.latents if latents is None else latents
        self._tell(done)

    def one_more(self, *_: int) -> None:
        """The piece of work at hand is done, and the next one is worth as much."""
        self.to(self.done + self.worth)

    def _tell(self, done: float) -> None:
        if self.watch.cancelled():
            raise Cancelled("the drawing was cancelled")
        self.watch.step(min(done, self.total), self.total, self.latents)
