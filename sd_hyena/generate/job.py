"""The images of one config; one that fails, or does not fit, does not cost the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sd_hyena.files.comparison import similarity
from sd_hyena.generate.alternatives import Alternative, said_of_kept
from sd_hyena.generate.arrangement import Arrangement, tile_fusion
from sd_hyena.generate.drawing import Picture, draw, steps_of_image
from sd_hyena.generate.growth import Stage, Standing
from sd_hyena.generate.watch import Advance, Watch
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.large.tiled_upscaler import Enlarging
from sd_hyena.large.tiling import batches
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.growing import WHOLE
from sd_hyena.processes.group import Group
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.students.swap import swapped

OUT_OF_MEMORY = "out of memory; try --tiled_diffusion mixture, --ff_chunk_size 4096, a smaller size or --dtype bfloat16"


@dataclass(frozen=True)
class Drawn:
    """A picture, with the config that draws it alone again.

    It is number `n` of its drawing, by alternative number `h` of the students; `teacher` is the same without students, if
    that was asked for. Of a growing picture whose stages are saved, one that is not the last has its number as `stage`; it
    comes once more, in place of the first, if memory runs out later and all is drawn again in tiles.
    """

    h: int
    n: int
    config: GenerateConfig
    image: Image.Image
    teacher: Image.Image | None
    students: str  # each one's site and file, for people
    model: str
    model_sha256: str
    regions: dict[str, Any]  # as they travel in the picture
    stage: int | None = None

    @property
    def similarity(self) -> tuple[float, float]:
        """PSNR in dB and SSIM to the teacher's picture."""
        return similarity(np.array(self.teacher), np.array(self.image))


Pair = tuple[Picture, Picture | None]  # with students, and the teacher's if it is asked for


@dataclass(frozen=True)
class Job:
    """What all images of one config share.

    `stages` are drawn one after the other; `standing` gives the pipeline of each, and what its call needs for its task,
    `upscaler` enlarges from one to the next.
    `rows` are the images that are drawn here, `group` the processes that draw each of them together, `failed` what went
    wrong with some.
    """

    config: GenerateConfig
    stages: Sequence[Stage]
    standing: Standing
    upscaler: Enlarging | None
    model: str
    model_sha256: str
    rows: Sequence[int]
    group: Group
    advance: Advance
    failed: list[str] = field(default_factory=list)

    @classmethod
    def steps(cls, stages: Sequence[Stage], alternatives: Sequence[Sequence[Alternative]], rows: Sequence[int]) -> int:
        """Of the whole job, for who watches it."""
        total = 0
        for ones in alternatives:
            passes = 1
            for stage, one in zip(stages, ones, strict=True):
                passes = 2 if stage.config.compare and one.students else passes
                total += passes * len(rows) * (steps_of_image(stage.config) + stage.enlarges)
        return total

    def images(self, h: int, alternatives: Sequence[Alternative]) -> Iterator[Drawn]:
        """Those of alternative number `h`, one for each stage, that are drawn here, as they are done; the first of a
        group yields them."""
        kept = said_of_kept(self.config.keep_attention, [one.kept for one in alternatives])
        facts = alternatives[-1].label, self.model, self.model_sha256, self.stages[-1].arrangement.metadata
        for rows in batches(self.rows, self.config.batch_size):
            for stage, tiled, n, *pair in self._drawn(alternatives, rows):
                if self.group.rank == 0:
                    image, teacher = (None if one is None else Image.fromarray(one.pixels) for one in pair)
                    own = dict(
                        hyena=alternatives[-1].entry, seed=(self.config.seed + n) % 2**32, num_images=1, iteration=1
                    )
                    own["keep_attention"] = kept
                    own |= {"grow": method} if (method := self.stages[-1].method) != "off" else {}
                    strengths = {one.config.strength for one in self.stages[1:]}
                    own |= {"grow_strength": strengths.pop()} if len(strengths) == 1 else {}
                    own |= {"tiled_diffusion": tiled} if tiled else {}
                    yield Drawn(h, n, replace(self.config, **own), image, teacher, *facts, stage)

    def _drawn(
        self,
        alternatives: Sequence[Alternative],
        rows: Sequence[int],
        tiled: str = "",
        first: int = 0,
        before: Sequence[Pair] | None = None,
    ) -> Iterator[tuple[int | None, str, int, Picture, Picture | None]]:
        """Stage, tiles, number and pictures of each, from stage number `first` on, for which those `before` are done. Rows
        that fail are halved. One image that does not fit is drawn in tiles if these are left to us (`auto`), all its stages:
        as --from will."""
        start, count = self.advance.done, len(alternatives)
        try:
            for i in range(first, count):
                start, first = self.advance.done, i
                before = self.group.tried(partial(self._tried, i, alternatives[i], rows, before, tiled))
                first = i + 1
                if first == count or self.config.save_stages:
                    for n, pair in zip(rows, before, strict=True):
                        yield None if first == count else i, tiled, n, *pair
            return
        except (FloatingPointError, RuntimeError) as error:
            full = is_out_of_memory(error)
            if not full and not isinstance(error, FloatingPointError):
                raise
            failure = f"image {rows[0]}: {OUT_OF_MEMORY if full else error}"
        release()
        self.advance.to(start)
        if len(rows) > 1:
            half = len(rows) // 2
            for part in (slice(half), slice(half, None)):
                yield from self._drawn(alternatives, rows[part], tiled, first, before and before[part])
            return
        stage = self.stages[-1]
        untiled = self.config.tiled_diffusion == "auto" and not tiled and stage.arrangement.tiles is None
        untiled = untiled and stage.method not in WHOLE  # of which each tile would be a picture of its own
        if full and untiled and all(one.serves_any_size for one in alternatives):
            there = replace(stage.config, tiled_diffusion="mixture")
            self.advance.watch.note(f"out of memory: {Arrangement.of(there)}")
            self.advance.to(start - self.steps(self.stages[:first], [alternatives[:first]], rows))
            yield from self._drawn(alternatives, rows, "mixture")
            return
        self.failed.append(failure)

    def _tried(
        self, i: int, alternative: Alternative, rows: Sequence[int], before: Sequence[Pair] | None, tiled: str
    ) -> list[Pair]:
        """The pictures of stage number i, drawn from those `before`."""
        stage = self.stages[i]
        pipe, given = self.standing.at(i)
        config = replace(stage.config, tiled_diffusion=tiled) if tiled else stage.config
        tiles = tile_fusion(config) if config != stage.config else None

        def drawn(which: int) -> list[Picture]:
            pictures = [pair[which] or pair[0] for pair in before or ()]
            start = {"image": stage.start(pictures, self.upscaler, self.advance)} if before else {}
            return draw(pipe, config, given | start, rows, self.advance)

        with tiled_diffusion(pipe, **vars(tiles) | {"map": self.map}) if tiles else nullcontext():
            with swapped(pipe.unet, alternative.students):
                images = drawn(0)
            differs = config.compare and (alternative.students or (before and before[0][1] is not None))
            teachers = drawn(1) if differs else [None] * len(rows)
        return list(zip(images, teachers, strict=True))

    def map(self, do: Callable[[Any], Tensor], work: Sequence[Any]) -> Iterable[Tensor]:
        """The group's, where each batch of tiles counts as a part of the step at hand."""
        for i, result in enumerate(self.group.map(do, work), start=1):
            self.advance.within(i, len(work))
            yield result


def shares(group: Group, total: int, arrangement: Arrangement, watch: Watch) -> tuple[range, Group]:
    """Which images this process draws, and with whom: each by itself, or all together where there are fewer images."""
    if total >= group.size:
        return range(total)[group.rank :: group.size], Group()
    if arrangement.tiles is None:
        watch.note(
            f"note: {total} images in one piece keep {total} of {group.size} processes busy; draw more, or in tiles"
        )
        return range(total)[group.rank :: group.size], Group()
    return range(total), group
