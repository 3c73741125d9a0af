"""The images of one config; one that fails, or does not fit, does not cost the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from sd_hyena.files.comparison import similarity
from sd_hyena.generate.alternatives import Alternative
from sd_hyena.generate.arrangement import Arrangement, tile_fusion
from sd_hyena.generate.drawing import draw, steps_of_image
from sd_hyena.generate.watch import Advance, Watch
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.large.tiling import batches
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.processes.group import Group
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.students.swap import swapped

OUT_OF_MEMORY = "out of memory; try --tiled_diffusion mixture, --ff_chunk_size 4096, a smaller size or --dtype bfloat16"


@dataclass(frozen=True)
class Drawn:
    """A picture, with the config that draws it alone again.

    It is number `n` of its drawing, by alternative number `h` of the students; `teacher` is the same without students, if
    that was asked for.
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

    @property
    def similarity(self) -> tuple[float, float]:
        """PSNR in dB and SSIM to the teacher's picture."""
        return similarity(np.array(self.teacher), np.array(self.image))


@dataclass(frozen=True)
class Job:
    """What all images of one config share; `given` is what the pipeline's call needs for its task.

    `rows` are the images that are drawn here, `group` the processes that draw each of them together, `failed` what went
    wrong with some.
    """

    pipe: Any
    config: GenerateConfig
    given: dict[str, Any]
    arrangement: Arrangement
    model: str
    model_sha256: str
    rows: Sequence[int]
    group: Group
    advance: Advance
    failed: list[str] = field(default_factory=list)

    @classmethod
    def steps(cls, config: GenerateConfig, alternatives: Sequence[Alternative], rows: Sequence[int]) -> int:
        """Of the whole job, for who watches it."""
        passes = sum(2 if config.compare and one.students else 1 for one in alternatives)
        return passes * len(rows) * steps_of_image(config)

    def images(self, h: int, alternative: Alternative) -> Iterator[Drawn]:
        """Those of alternative number `h` that are drawn here, as they are done; the first of a group yields them."""
        for rows in batches(self.rows, self.config.batch_size):
            for config, n, *pair in self._drawn(self.config, alternative, rows):
                if self.group.rank == 0:
                    image, teacher = (None if pixels is None else Image.fromarray(pixels) for pixels in pair)
                    own = dict(hyena=alternative.entry, seed=(config.seed + n) % 2**32, num_images=1, iteration=1)
                    own["keep_attention"] = ",".join(alternative.kept)  # as it was measured here
                    facts = alternative.label, self.model, self.model_sha256, self.arrangement.metadata
                    yield Drawn(h, n, replace(config, **own), image, teacher, *facts)

    def _drawn(self, config: GenerateConfig, alternative: Alternative, rows: Sequence[int]) -> list[tuple]:
        """Rows that fail are halved. One image that does not fit is drawn in tiles if these are left to us (`auto`)."""
        done = self.advance.done
        try:
            return self.group.tried(lambda: self._tried(config, alternative, rows))
        except (FloatingPointError, RuntimeError) as error:
            full = is_out_of_memory(error)
            if not full and not isinstance(error, FloatingPointError):
                raise
            failure = f"image {rows[0]}: {OUT_OF_MEMORY if full else error}"
        release()
        self.advance.to(done)
        if len(rows) > 1:
            half = len(rows) // 2
            return [one for part in (rows[:half], rows[half:]) for one in self._drawn(config, alternative, part)]
        untiled = config.tiled_diffusion == "auto" and self.arrangement.tiles is None
        if full and untiled and alternative.serves_any_size:
            config = replace(config, tiled_diffusion="mixture")
            self.advance.watch.note(f"out of memory: {Arrangement.of(config)}")
            return self._drawn(config, alternative, rows)
        self.failed.append(failure)
        return []

    def _tried(self, config: GenerateConfig, alternative: Alternative, rows: Sequence[int]) -> list[tuple]:
        """Of each image its config, number, pixels and the teacher's or None."""
        tiles = tile_fusion(config) if config != self.config else None
        with tiled_diffusion(self.pipe, **vars(tiles) | {"map": self.map}) if tiles else nullcontext():
            with swapped(self.pipe.unet, alternative.students):
                images = draw(self.pipe, config, self.given, rows, self.advance)
            compare = config.compare and alternative.students
            teachers = draw(self.pipe, config, self.given, rows, self.advance) if compare else [None] * len(rows)
        return [(config, n, *pair) for n, *pair in zip(rows, images, teachers, strict=True)]

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
