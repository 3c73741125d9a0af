"""The engine: a model that stays loaded, and the pictures drawn with it.

    engine = Engine()
    for drawn in engine.draw(config, watch):
        drawn.image.save("picture.png")

A next config loads what differs from the last one, and nothing else: another model, VAE, dtype, device or offload the
pipeline; another file, or one that has changed, itself alone; prompts, sizes, samplers, tiles nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sd_hyena.generate.alternatives import (
    Alternative,
    check_sizes,
    check_target,
    files_of,
    joined_students,
    keep_attention,
    kept_in,
    students_of,
)
from sd_hyena.generate.growth import Stage, Standing
from sd_hyena.generate.job import Drawn, Job, shares
from sd_hyena.generate.kept import Kept, stamp
from sd_hyena.generate.latent_colours import coloured, fitted
from sd_hyena.generate.offload import offload
from sd_hyena.generate.optimize import optimized
from sd_hyena.generate.order import Order
from sd_hyena.generate.remarks import of_order, of_students
from sd_hyena.generate.summary import summary
from sd_hyena.generate.task import controlnets, loras
from sd_hyena.generate.watch import Advance, Watch
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.models.upscaler import Upscaler
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.landmarks import Landmarks
from sd_hyena.options.rules import drawn_seed
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.processes.group import Group
from sd_hyena.processes.progress import work
from sd_hyena.students.checkpoint import StudentFile
from sd_hyena.text.encoding import chunks, weighted_prompts
from sd_hyena.text.textual_inversion import embedded

KERNELS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


class NotDrawn(RuntimeError):
    """Some images failed, for the reasons in `failures`; the others were drawn."""

    def __init__(self, failures: list[str], total: int, where: str = ""):
        super().__init__(f"{len(failures)} of {total} images failed{where}; {failures[0]}")
        self.failures, self.total = failures, total


@dataclass(frozen=True)
class Model:
    """A pipeline as it was loaded."""

    pipe: Any
    path: Path
    sha256: str
    scheduler: Any


class Engine:
    """A model that stays loaded, and the pictures drawn with it. One drawing at a time."""

    def __init__(self):
        self._kept = Kept()
        self._model: tuple[Hashable, Model] | None = None
        self._drawing = False

    def load(self, config: GenerateConfig) -> Model:
        """The pipeline that `config` is drawn with, its LoRAs and embeddings in it, its sampler set. Raises BadInput."""
        return self._loaded(Order.of(config), [])[0]

    def draw(self, config: GenerateConfig, watch: Watch | None = None, group: Group | None = None) -> Iterator[Drawn]:
        """The pictures of a config, each as it is done.

        Raises BadInput before anything is drawn, Cancelled as soon as the watch says so, NotDrawn at the end if an image
        failed. Afterwards, and if nobody asks for the rest, the model is as it was. `group` are the processes that share
        the work.
        """
        if self._drawing:
            raise RuntimeError("this engine is drawing already; take its pictures, or close that drawing, first")
        self._drawing = True
        try:
            yield from self._draw(Order.of(config), watch or Watch(), group or Group())
        finally:
            self._drawing = False

    def preview(self, latents: Tensor) -> Image.Image:
        """Latents (C, h, w) of the model that is loaded, noisy ones too, as a small picture, without its VAE."""
        if self._model is None:
            raise RuntimeError("no model is loaded whose latents these could be; draw, or load, first")
        on, model = self._model
        return coloured(latents, self._kept.get(("colours", on), lambda: nullcontext(fitted(model.pipe))))

    def close(self) -> None:
        """Let go of everything. The engine can be used again."""
        self._model = None
        self._kept.only(())

    def _draw(self, order: Order, watch: Watch, group: Group) -> Iterator[Drawn]:
        model, nets, stored = self._loaded(order, [_files(stage) for stage in order.stages])
        left_to_us = order.config.grow == "auto" and not order.config.hires
        if left_to_us and len(order.stages) > 1 and _of_one_size(stored):
            order = order.plainly
            model, nets, stored = self._loaded(order, [_files(stage) for stage in order.stages])
        config, pipe, arrangement = order.config, model.pipe, order.stages[-1].arrangement
        prompt = prompts_of(order.model)[0] if config.prompt is None else config.prompt
        config = replace(config, seed=group.agreed(drawn_seed(config.seed)), prompt=prompt)
        stages = [stage.told(config.seed, prompt) for stage in order.stages]
        by_stage = [joined_students(config.hyena, one) or [Alternative({})] for one in stored]
        check_target(config.target, stored[-1])
        for stage, alternatives in zip(stages, by_stage, strict=True):
            for alternative in alternatives:
                check_sizes(alternative, pipe.unet, stage.arrangement.tile)
        for line in (*of_order(order, prompt), *of_students(stages, by_stage, model.sha256)):
            watch.note(line)
        if config.keep_attention:
            wanted = kept_in(config.keep_attention, len(stages))
            for stage, alternatives, keep in zip(stages, by_stage, wanted, strict=True):
                met = stage.arrangement.tile, config.batch_size * (1 + (config.cfg_scale > 1))
                alternatives[:] = [self._keeping(group, one, pipe.unet, keep, *met) for one in alternatives]
        if (count := len(chunks(prompt, pipe.tokenizer))) > 1:
            watch.note(f"note: the prompt is read in {count} chunks of {pipe.tokenizer.model_max_length - 2} tokens")
        alternatives = list(zip(*by_stage, strict=True))
        students = [student for ones in alternatives for one in ones for student in one.students.values()]
        total = config.num_images * config.iteration
        rows, together = shares(group, total, arrangement, watch)
        watch.drawing(summary(config, order.device, order.dtype, [ones[-1] for ones in alternatives], total))
        advance = Advance(watch, Job.steps(stages, alternatives, rows) + stages[0].task.enlarges)
        upscaler = self._upscaler(order)
        if config.upscaler and config.init_image:
            stages[0] = stages[0].enlarged(upscaler, advance.within)
            advance.to(float(order.stages[0].task.enlarges))

        @contextmanager
        def standing(i: int) -> Iterator[tuple[Any, dict[str, Any]]]:
            stage = stages[i]
            with (
                stage.task.prepared(pipe, nets) as (own, given),
                weighted_prompts(own, config.clip_skip),
                stage.arrangement.around(own, job.map, advance.within, advance.one_more),
                stage.around(own, job.map),
            ):
                yield own, given

        around = Standing(standing)
        facts = order.model.name, model.sha256, rows, together, advance
        job = Job(config, stages, around, upscaler, *facts)
        with (
            _attention_backend(config.attention_backend),
            optimized(pipe.unet, config.optimizations, students),
            closing(around),
        ):
            for h, ones in enumerate(alternatives):
                yield from job.images(h, ones)
        if job.failed and together.rank == 0:  # of those who draw an image together the first one tells
            raise NotDrawn(job.failed, len(alternatives) * len(rows))

    def _loaded(
        self, order: Order, files: Sequence[dict[str, Hashable]]
    ) -> tuple[Model, list[torch.nn.Module], list[dict[str, StudentFile]]]:
        """What an order needs: the model, its ControlNets, and the students of each stage's `files` by name."""
        config, keys = order.config, order.keys()
        on = keys["pipeline"]
        students = [{name: (*key, on) for name, key in one.items()} for one in files]
        if self._model is not None and self._model[0] != on:
            self._model = None
        self._kept.only(
            [*keys.values(), *(key for one in students for key in one.values()), ("offload", on), ("colours", on)]
        )
        self._upscaler(order)  # what is wrong with it is said before the model is loaded
        model = self._kept.get(on, lambda: _pipeline(order))
        self._model = on, model
        pipe = model.pipe
        self._kept.get(keys["embeddings"], lambda: embedded(pipe, order.embeddings))
        self._kept.get(keys["loras"], lambda: loras(pipe, order.loras))
        nets = self._kept.get(keys["controlnets"], lambda: nullcontext(controlnets(config, pipe.unet)))
        like = None
        if config.offload != "off":
            self._kept.get(("offload", on), lambda: nullcontext(offload(pipe, config.offload, order.device)))
            like = torch.empty(0, dtype=order.dtype, device=order.device)  # students stay on the device
        load = lambda name, tile: lambda: nullcontext(students_of(name, pipe.unet, tile, config.target, like))
        tiles = [stage.arrangement.tile for stage in order.stages]
        stored = [
            {name: self._kept.get(key, load(name, tile)) for name, key in one.items()}
            for tile, one in zip(tiles, students, strict=False)  # none where the model alone is asked for
        ]
        pipe.scheduler = model.scheduler
        set_scheduler(pipe, config.scheduler, config.karras)
        return model, nets, stored

    def _upscaler(self, order: Order) -> Upscaler | None:
        return self._kept.get(order.upscaler_key, lambda: nullcontext(order.upscaler()))

    def _keeping(
        self, group: Group, alternative: Alternative, unet: Any, wanted: str, tile: tuple, batch: int
    ) -> Alternative:
        """The same sites keep their attention in all processes: the first one measures."""
        if group.rank == 0:
            alternative = keep_attention(alternative, unet, wanted, tile, batch)
        kept = group.agreed(",".join(alternative.kept))
        return alternative if group.rank == 0 else keep_attention(alternative, unet, kept, tile, batch)


def _files(stage: Stage) -> dict[str, Hashable]:
    """The students that a stage names, each with what tells it from others."""
    config, tile = stage.config, stage.arrangement.tile
    return {
        name: ("students", name, tile) if Landmarks.read(name) else ("students", stamp(name), config.target)
        for name in files_of(config.hyena)
    }


def _of_one_size(stored: Sequence[dict[str, StudentFile]]) -> bool:
    """Whether a student is among them that serves the size alone which it was trained at."""
    files = (file for one in stored for file in one.values())
    return any(student.spec.size is not None for file in files for student in file.students.values())


@contextmanager
def _pipeline(order: Order) -> Iterator[Model]:
    at_first = order.device if order.config.offload == "off" else torch.device("cpu")
    with work(f"loading {order.model.name}", announced=False):
        pipe = load_pipeline(order.model, at_first, order.dtype, order.config.vae)
        sha256 = model_sha256(order.model)
    yield Model(pipe, order.model, sha256, pipe.scheduler)


@contextmanager
def _attention_backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, KERNELS[name])):
        yield
