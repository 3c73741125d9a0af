"""Images of one run, drawn and written; one that fails, or does not fit, does not cost the others."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sd_hyena.files.comparison import side_by_side, similarity
from sd_hyena.files.picture import write_image
from sd_hyena.generate.alternatives import Alternative
from sd_hyena.generate.arrangement import Arrangement, tile_fusion
from sd_hyena.generate.drawing import draw
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.large.tiling import batches
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import parameters
from sd_hyena.processes.group import Group
from sd_hyena.processes.memory import is_out_of_memory, release
from sd_hyena.processes.ranks import rank
from sd_hyena.students.swap import swapped

OUT_OF_MEMORY = "out of memory; try --tiled_diffusion mixture, --ff_chunk_size 4096, a smaller size or --dtype bfloat16"


@dataclass(frozen=True)
class Drawn:
    """Image number `n`, uint8 (H, W, 3), with the config that draws it again; the teacher's beside it if asked for."""

    n: int
    config: GenerateConfig
    image: np.ndarray
    teacher: np.ndarray | None


@dataclass(frozen=True)
class Job:
    """What all images of a run share; `given` is what the pipeline's call needs for its task, `failed` what went wrong.

    `rows` are the images that are drawn here, `group` the processes that draw each of them together.
    """

    pipe: Any
    config: GenerateConfig
    given: dict[str, Any]
    arrangement: Arrangement
    folder: Path
    model: str
    sha256: str
    rows: Sequence[int]
    group: Group
    failed: list[str] = field(default_factory=list)

    def write(self, h: int, alternative: Alternative) -> list[tuple[tuple[int, int], list[Path]]]:
        """The images of alternative number `h` that are drawn here, each as (h, n) and its files; the group's first writes."""
        config = self.config
        steps = int(config.steps * config.strength) if config.init_image else config.steps
        total, silent = len(self.rows) * steps, True if rank() else None  # None: where nobody watches
        with tqdm(total=total, unit="step", disable=silent, desc=alternative.label or self.model) as bar:
            return [
                ((h, drawn.n), self._written(h, alternative, drawn))
                for rows in batches(self.rows, config.batch_size)
                for drawn in self._drawn(config, alternative, rows, bar)
                if self.group.rank == 0
            ]

    def _drawn(self, config: GenerateConfig, alternative: Alternative, rows: Sequence[int], bar: Any) -> list[Drawn]:
        """Rows that fail are halved. One image that does not fit is drawn in tiles if these are left to us (`auto`)."""
        done = bar.n
        try:
            return self.group.tried(lambda: self._tried(config, alternative, rows, bar))
        except (FloatingPointError, RuntimeError) as error:
            full = is_out_of_memory(error)
            if not full and not isinstance(error, FloatingPointError):
                raise
            failure = f"image {rows[0]}: {OUT_OF_MEMORY if full else error}"
        release()
        bar.update(done - bar.n)
        if len(rows) > 1:
            half = len(rows) // 2
            return [d for part in (rows[:half], rows[half:]) for d in self._drawn(config, alternative, part, bar)]
        untiled = config.tiled_diffusion == "auto" and self.arrangement.tiles is None
        if full and untiled and alternative.serves_any_size:
            config = replace(config, tiled_diffusion="mixture")
            if rank() == 0:
                tqdm.write(f"out of memory: {Arrangement.of(config)}", file=sys.stderr)
            return self._drawn(config, alternative, rows, bar)
        self.failed.append(failure)
        return []

    def _tried(self, config: GenerateConfig, alternative: Alternative, rows: Sequence[int], bar: Any) -> list[Drawn]:
        tiles = tile_fusion(config) if config != self.config else None
        with tiled_diffusion(self.pipe, **vars(tiles) | {"map": self.group.map}) if tiles else nullcontext():
            with swapped(self.pipe.unet, alternative.students):
                images = draw(self.pipe, config, self.given, rows, bar)
            compare = config.compare and alternative.students
            teachers = draw(self.pipe, config, self.given, rows) if compare else [None] * len(rows)
        return [Drawn(n, config, *pair) for n, *pair in zip(rows, images, teachers, strict=True)]

    def _written(self, h: int, alternative: Alternative, drawn: Drawn) -> list[Path]:
        """The image with what repeats it, and the comparison beside it."""
        config, n = drawn.config, drawn.n
        own = dict(hyena=alternative.entry, seed=(config.seed + n) % 2**32, num_images=1, iteration=1)
        own["keep_attention"] = ",".join(alternative.kept)  # as it was measured here
        one = to_dict(replace(config, **own))
        text = parameters(one, self.model, self.sha256, alternative.label)
        metadata = {"config": one, "model_sha256": self.sha256, "students": alternative.label}
        metadata |= self.arrangement.metadata
        name = config.name_format.format(h=h, n=n, b=n // config.num_images, i=n % config.num_images)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        path = write_image(self.folder / f"{name}.png", Image.fromarray(drawn.image), text, metadata)
        if drawn.teacher is None:
            return [path]
        psnr, ssim = similarity(drawn.teacher, drawn.image)
        beside = path.with_name(f"{path.stem}-compare.png")
        picture = Image.fromarray(side_by_side(drawn.teacher, drawn.image))
        beside = write_image(beside, picture, text, metadata | {"psnr": psnr, "ssim": ssim})
        if rank() == 0:
            tqdm.write(f"{beside}: teacher | student | difference, PSNR {psnr:.1f} dB, SSIM {ssim:.3f}")
        return [path, beside]
