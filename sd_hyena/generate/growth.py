"""A picture that grows: its stages, each an ordinary drawing of a config, and what stands around the pipeline in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image

from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.drawing import Picture, denoising_steps
from sd_hyena.generate.task import Task
from sd_hyena.generate.watch import Advance
from sd_hyena.large.enlargement import enlarge
from sd_hyena.large.growing.deep_shrink import DeepShrink, deep_shrink
from sd_hyena.large.growing.demofusion import DemoFusion, demofusion
from sd_hyena.large.growing.diffusehigh import DiffuseHigh, diffusehigh
from sd_hyena.large.growing.hidiffusion import HiDiffusion, hidiffusion
from sd_hyena.large.growing.resized import resized
from sd_hyena.large.growing.stages import STEP, Canvas, sizes, times
from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_upscaler import Enlarging
from sd_hyena.options import grow_options
from sd_hyena.options.generate_config import BEFORE, GenerateConfig
from sd_hyena.options.grow_options import OPTIONS
from sd_hyena.options.growing import MOST, STAGED, WHOLE
from sd_hyena.options.rules import NOISE_LEVELS
from sd_hyena.options.tile import is_cut

STRENGTH = {"redraw": 0.3, "diffusehigh": 0.3, "demofusion": 1.0}  # of the stages but the first
NEAR, FAR = (
    2.0,
    0.15,
)  # times the model's own side up to which a redraw's is that, and beyond, where it splits what is wide
ANOTHER_NOISE = 0x9E3779B9  # between the seeds of two stages
KINDS = {"redraw": dict, "diffusehigh": DiffuseHigh, "demofusion": DemoFusion}
KINDS |= {"deep_shrink": DeepShrink, "hidiffusion": HiDiffusion}
HELD = 1 / 3  # of diffusehigh's steps: 5 of 15 are published


def sizes_of(config: GenerateConfig, own: int, method: str) -> list[Canvas]:
    """The canvases of all stages."""
    first = config.width, config.height
    if config.hires and method != "off":
        return [first, tuple(round(side * config.hires / STEP) * STEP for side in first)]
    if method in WHOLE and is_cut(config):  # a tile would be composed by itself
        return sizes(first, round(MOST * own))
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
    said: str = ""  # the method's options

    @classmethod
    def all_of(cls, config: GenerateConfig, own: int, method: str) -> list[Stage]:
        """Those of a config. Raises BadInput."""
        found = []
        for i, (width, height) in enumerate(sizes_of(config, own, method)):
            one = dict(width=width, height=height, grow="off", hires=0.0, save_stages=False, grow_options="")
            if i:
                far = 1.0 if config.hires else times((width, height), own)  # a size that somebody chose is near
                one |= again(config, method, far) | {"init_image": BEFORE, "mask": ""}
                if method == "demofusion":
                    one |= {"noise_inversion": 0}  # which needs the picture itself
                    if config.tiled_diffusion == "auto":
                        tile = max(8, own // STEP)
                        one |= {"tiled_diffusion": "multidiffusion"}
                        one |= {side: getattr(config, side) or tile for side in ("tile_width", "tile_height")}
            elif not config.init_image:
                one |= {"noise_inversion": 0}
            if not i and method in WHOLE and is_cut(config):
                one |= {"tiled_diffusion": "off"}
            own_config = replace(config, **one) if method != "off" else config
            arrangement = Arrangement.of(own_config)
            if i and method == "demofusion" and arrangement.tiles:
                arrangement = replace(arrangement, tiles=replace(arrangement.tiles, jitter=True))
            said = config.grow_options if method != "off" else ""
            stage = cls(own_config, Task.of(own_config, config), arrangement, i, method, own, said)
            if i or method in WHOLE:
                KINDS[method](**stage.options())  # what it cannot be told is said now
            found.append(stage)
        return found

    @property
    def way(self) -> str:
        """What is done in this stage: what was composed in one piece is drawn again, larger, as any other picture."""
        return "redraw" if self.i and self.method in WHOLE else self.method

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
        methods = {"deep_shrink": deep_shrink, "hidiffusion": hidiffusion} if not self.i else {}
        methods |= {"diffusehigh": diffusehigh, "demofusion": demofusion} if self.i else {}
        if self.way not in methods:
            return nullcontext()
        more = {"map": map} if self.way == "demofusion" else {}
        return methods[self.way](pipe, **self.options() | more)

    def options(self) -> dict[str, Any]:
        """What the method's context manager is given in this stage."""
        config, given = self.config, grow_options.read(self.method, self.said)
        asked = {name: value for name, value in given.items() if value != OPTIONS[self.method][name].default}
        if self.way in WHOLE:
            own = {} if "t1" in asked or "t2" in asked else {"own": self.own / STEP}
            return asked | own | {"circular": config.circular and self.arrangement.tiles is None}
        if self.way == "diffusehigh":
            return {"steps": self.held} | asked | {"circular": config.circular}
        if self.way == "demofusion":
            at_once = 1 if self.arrangement.guides_regions else config.tile_batch_size
            own = {"dilation": max(2, round(self.times)), "tile_batch_size": at_once}
            return own | asked | {"circular": config.circular}
        return {}

    @property
    def held(self) -> int:
        """Of diffusehigh's steps, where the number is left to it."""
        return max(1, round(HELD * denoising_steps(self.config)))

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
            size, circular = (height // STEP, width // STEP), self.config.circular
            latents = [resized(one.latents.float(), size, circular=circular) for one in before]
            return torch.cat(latents).to(before[0].latents)
        enlarged, advance.worth = [], 1.0
        for one in before:
            picture, circular = Image.fromarray(one.pixels), self.config.circular
            enlarged.append(enlarge(picture, (width, height), upscaler, advance.within, circular=circular))
            advance.to(advance.done + self.enlarges)
        return enlarged


def grown(config: GenerateConfig, stages: Sequence[Stage]) -> Iterator[str]:
    """What is done for a picture to stay one, for people; nothing if it is drawn plainly."""
    method = stages[-1].method
    if method == "off":
        return
    sizes = [f"{stage.config.width}x{stage.config.height}" for stage in stages]
    plainly = f"draws {sizes[0]} alone" if config.hires else "draws it plainly"
    yield f"growing by {method}, {' -> '.join(sizes)} px; --grow off {plainly}"
    if method in WHOLE and len(stages) == 1 and config.tiled_diffusion != "auto" and is_cut(config):
        yield f"note: tiled_diffusion={config.tiled_diffusion} has no effect here, {method} composes in one piece"


def strength_at(far: float, method: str) -> float:
    """How much a stage that is not the first draws anew at so many times the model's own side."""
    return FAR if method == "redraw" and far > NEAR else STRENGTH["redraw" if method in WHOLE else method]


def again(config: GenerateConfig, method: str, far: float) -> dict[str, Any]:
    """Strength and steps of such a stage: at least one is taken."""
    strength = config.grow_strength or strength_at(far, method)
    if not config.grow_steps and int(config.steps * strength):
        return {"strength": strength}
    return {"strength": strength, "steps": min(NOISE_LEVELS, -int(-max(config.grow_steps, 1) // strength))}


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
