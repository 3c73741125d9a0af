"""What a run may be a part of: a recipe, the pilot of another run, a comparison of operators."""

from __future__ import annotations

from dataclasses import dataclass

from sd_hyena.options.train_config import TrainConfig


@dataclass(frozen=True)
class LargerRun:
    """What its parts say and leave in its place: they write no OUT_DIR/hyena.pt, and name no next command.

    again: how the whole goes on after a part was stopped and saved, for a person.
    followed_by: the stages of a recipe that are still to come, whose time is told with the first one's.
    """

    again: str = "the same command goes on from there"
    followed_by: tuple[TrainConfig, ...] = ()
