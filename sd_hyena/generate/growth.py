"""A picture that grows: its stages, each an ordinary drawing of a config, and what stands around the pipeline in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.drawing import Picture, denoising_steps
from sd_hyena.generate.task import Task
from sd_hyena.generate.watch import Advance
from sd_hyena.large.enlargement import enlarge
from sd_hyena.large.growing.deep_shrink import deep_shrink
from sd_hyena.large.growing.demofusion import demofusion
from sd_hyena.large.growing.diffusehigh import diffusehigh, sharpened
from sd_hyena.large.growing.hidiffusion import hidiffusion, switches
from sd_hyena.large.growing.stages import STEP, Canvas, sizes, times
from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_upscaler import Enlarging
from sd_hyena.options.generate_config import BEFORE, STAGED, GenerateConfig

STRENGTH = {"redraw": 0.3, "diffusehigh": 0.3, "demofusion": 1.0}  # of the stages but the first
ANOTHER_NOISE = 0x9E3779B9  # between the seeds of two stages
SHRINKS = 2.0  # as published; a canvas of four times the model's own size is shrunk by four
BEHIND = 16  # pixels that a circular picture goes on behind its borders while it is enlarged
HELD = 1 / 3  # of diffusehigh's steps: 5 of 15 are published


def sizes_of(config: GenerateConfig, own: int, method: str) -> list[Canvas]:
    """The canvases of all stages."""
    first = config.width, config.height
    if config.hires:
        return [first, tuple(round(side * config.hires / STEP) * STEP for side in first)]
    return sizes(first, own) if method in STAGED else [first]


@dataclass(frozen=True)
class Stage:
    """One of the drawings by which a picture comes about; number `i`, by a method, on a model of `own` pixels a side."""

    config: GenerateConfig
    task: Task
    arrangement: Arrangement
    i: int
    method: str
    own: int

    @classmethod
    def all_of(cls, config: GenerateConfig, own: int, method: str) -> list[Stage]:
        """Those of a config. Raises BadInput."""
        found = []
        for i, (width, height) in enumerate(sizes_of(config, own, method)):
            one = dict(width=width, height=height, grow="off", hires=0.0, save_stages=False)
            if i:
                one |= again(config, method) | {"init_image": BEFORE, "mask": ""}
                if method == "demofusion" and config.tiled_diffusion == "auto":
                    tile = max(8, own // STEP)
                    one |= {"tiled_diffusion": "multidiffusion"}
                    one |= {side: getattr(config, side) or tile for side in ("tile_width", "tile_height")}
            elif not config.init_image:
                one |= {"noise_inversion": 0}
            own_config = replace(config, **one) if method != "off" else config
            arrangement = Arrangement.of(own_config)
            if i and method == "demofusion" and arrangement.tiles:
                arrangement = replace(arrangement, tiles=replace(arrangement.tiles, jitter=True))
            found.append(cls(own_config, Task.of(own_config), arrangement, i, method, own))
        return found

    @property
    def times(self) -> float:
        """The canvas's side over the model's own."""
        return times((self.config.width, self.config.height), self.own)

    def told(self, seed: int, prompt: str) -> Stage:
        """The stage with what is known once the model is: each stage has noise of its own."""
        seed = (seed + self.i * ANOTHER_NOISE) % 2**32
        return replace(self, config=replace(self.config, seed=seed, prompt=prompt))

    def around(self, pipe: Any, map: Callable) -> AbstractContextManager:
        """The method, around a pipeline for this stage's task; `map` is TiledDiffusion's."""
        if self.method == "deep_shrink":
            return deep_shrink(pipe, factor=max(SHRINKS, self.times))
        if self.method == "hidiffusion":
            canvas = self.config.height, self.config.width
            return hidiffusion(pipe, **switches(canvas, (self.own, self.own)))
        if self.i and self.method == "diffusehigh":
            held = max(1, round(HELD * denoising_steps(self.config)))
            return diffusehigh(pipe, steps=held, circular=self.config.circular)
        if self.i and self.method == "demofusion":
            return demofusion(pipe, dilation=max(2, round(self.times)), circular=self.config.circular, map=map)
        return nullcontext()

    @property
    def enlarges(self) -> bool:
        """Whether an upscaler has work to do between the stage before and this one."""
        return bool(self.i and self.config.upscaler and self.method != "demofusion")

    def enlarged(self, upscaler: Enlarging, progress: Progress) -> Stage:
        """With the picture to start from as the canvas has it."""
        return replace(self, task=self.task.enlarged(upscaler, progress))

    def start(self, before: Sequence[Picture], upscaler: Enlarging | None, advance: Advance) -> Any:
        """What the pipeline's call takes as its picture: those of the stage before, enlarged."""
        width, height = self.config.width, self.config.height
        if self.method == "demofusion":
            latents = [F.interpolate(one.latents.float(), (height // 8, width // 8), mode="bicubic") for one in before]
            return torch.cat(latents).to(before[0].latents)
        enlarged, advance.worth = [], 1.0
        for one in before:
            found = larger(one.pixels, (width, height), self.config.circular, upscaler, advance.within)
            enlarged.append(sharpened(found) if self.method == "diffusehigh" else found)
            advance.to(advance.done + self.enlarges)
        return enlarged


def grown(stages: Sequence[Stage]) -> str:
    """What is done for a picture to stay one, for people; empty if it is drawn plainly."""
    method = stages[-1].method
    if method == "off":
        return ""
    way = " -> ".join(f"{stage.config.width}x{stage.config.height}" for stage in stages)
    return f"growing by {method}, {way} px; --grow off draws it plainly"


def again(config: GenerateConfig, method: str) -> dict[str, Any]:
    """Strength and steps of the stages but the first."""
    strength = config.grow_strength or STRENGTH[method]
    if not config.grow_steps:
        return {"strength": strength}
    return {"strength": strength, "steps": min(1000, max(1, -int(-config.grow_steps // strength)))}


def larger(
    pixels: np.ndarray,
    size: Canvas,
    circular: bool = False,
    upscaler: Enlarging | None = None,
    progress: Progress | None = None,
) -> Image.Image:
    """A picture (H, W, 3) at another size, by an upscaler and Lanczos; a circular one goes on behind its borders."""
    if not circular:
        return enlarge(Image.fromarray(pixels), size, upscaler, progress)
    margins = [min(BEHIND, side) for side in pixels.shape[1::-1]]
    wide = Image.fromarray(np.pad(pixels, ((margins[1],) * 2, (margins[0],) * 2, (0, 0)), mode="wrap"))
    if upscaler:
        wide = enlarge(wide, tuple(scale * upscaler.scale for scale in wide.size), upscaler, progress)
    times = wide.width / (pixels.shape[1] + 2 * margins[0])
    start = [times * margin for margin in margins]
    box = (*start, *(from_ + times * side for from_, side in zip(start, pixels.shape[1::-1], strict=True)))
    return wide.resize(size, Image.Resampling.LANCZOS, box)


class Standing:
    """What stands around a pipeline for one stage; it stays until another stage's is asked for."""

    def __init__(self, open: Callable[[int], AbstractContextManager[Any]]):
        self._open, self._i, self._value, self._stack = open, -1, None, ExitStack()

    def at(self, i: int) -> Any:
        """What stage number i's block gives."""
        if i != self._i:
            self.close()
            self._value = self._stack.enter_context(self._open(i))
            self._i = i
        return self._value

    def close(self) -> None:
        """Everything is as it was."""
        self._i = -1
        self._stack.close()
