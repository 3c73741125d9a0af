"""What a run will take, told before the teacher draws anything: counted operations at the speed of one timed probe."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sd_hyena.cost.operations import attention_flops, change_flops
from sd_hyena.cost.timing import wait_for
from sd_hyena.distil.counted import PictureCost, of_student, of_unet, of_vae, saved_by
from sd_hyena.distil.lessons import VALIDATION_SIZE
from sd_hyena.distil.previews import PICTURES, drawn_with, draws_previews
from sd_hyena.models.condition import condition
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.options.key_values import auto_price
from sd_hyena.options.operators import operator_named
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.memory import peak_gib
from sd_hyena.processes.progress import Work
from sd_hyena.sites import Site, find_sites
from sd_hyena.students.student import Size, StudentSpec, spec_for
from sd_hyena.students.teacher import Teacher

PROBE = {"cpu": 4e10, "cuda": 2e13}  # operations of the first probe, at most
QUICK = 12  # seconds that a nearer one may take
GROWTH = 1.5  # of a UNet's operations with its tokens, between linear and quadratic: what a probe will have, roughly
LONG = 600.0  # seconds from which on ways around a run are named
SERVES = 512  # pixels at which a student learns what it needs for every size


@dataclass(frozen=True)
class Estimate:
    """Seconds of each phase of a run, in all, and GiB of memory at most."""

    seconds: dict[str, float]
    gib: float
    rate: float  # operations a second

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def line(self, device: torch.device) -> str:
        """For a person."""
        parts = ", ".join(f"{name} {Work.seconds_said(each)}" for name, each in self.seconds.items() if each)
        return (
            f"estimate: about {Work.seconds_said(self.total)} in all: {parts}; peak memory about {self.gib:.1f} GiB "
            f"({self.rate / 1e9:.0f} GFLOP/s on {device.type}, measured on random latents)"
        )


class Estimator:
    """Counts for one teacher and the sites of a run."""

    def __init__(self, pipe: Any, config: TrainConfig, sites: Sequence[Site], specs: Sequence[StudentSpec]):
        self.pipe, self.config, self.sites = pipe, config, sites
        self.specs = [_decided(spec) for spec in specs]
        self.size = config.height // 8, config.width // 8
        side = pipe.unet.config.sample_size
        self.native = (side, side)
        self.students = sum(
            of_student(spec, site.size(*self.size)) for spec, site in zip(self.specs, sites, strict=True)
        )
        self.attentions = sum(attention_flops(site, site.size(*self.size)) for site in sites)

    def estimate(self, missing: int, device: torch.device, n_steps: int, rate: float | None = None) -> Estimate:
        """With so many pictures yet to be made and so many steps to go, which are fewer than all of a run that goes on; the
        operations a second are measured if not given."""
        rate, config = rate or self._rate(device), self.config
        validations = self._validations(n_steps)
        picture, of_one = PictureCost(self.pipe, config), VALIDATION_SIZE * (self._teaching() + self.students)
        operations = {
            f"drawing {missing} pictures": missing and missing * picture.steps,
            "encoding": missing and missing * picture.encoding,
            f"{n_steps} steps of batch {config.batch_size}": n_steps * config.batch_size * self._lesson(),
            f"{validations} validation{'s' * (validations > 1)}": validations * of_one,
            "previews": self._previews(validations, device),
        }
        seconds = {name: count / rate for name, count in operations.items()}
        return Estimate(seconds, self._gib(device), rate)

    def _validations(self, n_steps: int) -> int:
        """Every so many steps and after the last one; a run that goes on makes none before its first."""
        start, every = max(self.config.n_steps - n_steps, 0), self.config.validate_every_n_steps
        end = start + n_steps
        within = end // every - start // every + (end % every > 0) if every else 1
        return within if start else 1 + within

    def times_cheaper(self, sites: Sequence[Site]) -> float:
        """The UNet with students at these sites, in operations."""
        whole, options = self._unet(self.size), self.config.options_of_operator()
        saved = 0
        for site in sites:
            size = site.size(*self.size)
            spec = _decided(spec_for(site, self.config.operator, options, self.size))
            saved += attention_flops(site, size) - of_student(spec, size) + change_flops(spec, size)
        return whole / (whole - saved)

    def _rate(self, device: torch.device) -> float:
        """Operations a second of the UNet: one forward for one sample, as near to the asked size as is quick (a large
        model's time at few tokens is that of its weights)."""
        allowed, native = PROBE.get(device.type, PROBE["cuda"]), self._unet(self.native)
        sizes = [self.size]
        while min(sizes[-1]) > 16 and native * (math.prod(sizes[-1]) / self.native[0] ** 2) ** GROWTH > allowed:
            sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
        rate = self._timed(sizes.pop(), device)
        own = math.prod(self.native)
        while sizes and math.prod(sizes[-1]) <= own and self._unet(sizes[-1]) / rate < QUICK:
            rate = self._timed(sizes.pop(), device)
        return rate

    def _timed(self, size: Size, device: torch.device) -> float:
        """Operations a second at a size of latents (H, W)."""
        source = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 4, *size, generator=source).to(device)
        told, timestep = condition(self.pipe, "", 8 * size[1], 8 * size[0]), torch.tensor([500], device=device)
        seen: list[float] = []
        while not seen or (len(seen) < 2 and seen[0] < 1):  # what is quick is warmed up first
            started = time.perf_counter()
            with torch.no_grad():
                Teacher(self.pipe.unet, []).observe(latents, timestep, told)
            wait_for(device)
            seen.append(time.perf_counter() - started)
        return self._unet(size) / seen[-1]

    def _unet(self, size: Size, last: str = "") -> int:
        return of_unet(self.pipe.unet, size, last)

    def _teaching(self) -> int:
        """What the teacher does for one sample."""
        if self.config.stage != "layerwise":
            return self._unet(self.size)
        return self.attentions if self.config.data == "noise" else self._unet(self.size, self.sites[-1].name)

    def _lesson(self) -> int:
        """One sample, forward and backward."""
        if self.config.stage == "layerwise":
            return self._teaching() + 3 * self.students
        replaced = self._unet(self.size) - self.attentions + self.students
        return (self._teaching() + 3 * replaced) * (2 if self.config.stage == "end_to_end" else 1)

    def _previews(self, validations: int, device: torch.device) -> int:
        config = self.config
        if not draws_previews(device, config.width, config.height):
            return 0
        own = prompts_of(Path(), config.sample_prompts) if config.sample_prompts else []
        steps, guidance = drawn_with(config.teacher_model)
        branches = 2 if guidance > 1 else 1
        whole = self._unet(self.size)
        replaced = whole - self.attentions + self.students
        drawn = (
            branches * steps * (whole + validations * replaced)
            + (1 + validations) * of_vae(self.pipe.vae, self.size)[1]
        )
        return max(PICTURES, len(own)) * drawn

    def _gib(self, device: torch.device) -> float:
        """What is there now, and of the micro-batch what the students keep and the teacher has in hand."""
        config, dtype = self.config, self.pipe.unet.dtype
        samples = config.micro_batch_size or config.batch_size // config.processes
        kept = 0
        for spec, site in zip(self.specs, self.sites, strict=True):
            size = site.size(*self.size)
            kept += saved_by(spec, size, dtype) + 6 * size[0] * size[1] * site.channels * dtype.itemsize
        return peak_gib(device) + samples * kept / 2**30


def advice(found: Estimate, estimator: Estimator, device: torch.device) -> list[str]:
    """Where a better choice exists."""
    config, lines = estimator.config, []
    pixels = config.width * config.height
    if pixels > 1.5 * SERVES**2 and all(spec.size is None for spec in estimator.specs):
        lines.append(
            f"a student serves every size: training at -W {SERVES} costs {pixels / SERVES**2:.0f} times less a step "
            f"and serves {config.width}x{config.height} too (docs/operator.md)"
        )
    everywhere = find_sites(estimator.pipe.unet)
    level = min(site.level for site in everywhere)
    lowest = [site for site in everywhere if site.level == level]
    ours, theirs = (estimator.times_cheaper(sites) for sites in (estimator.sites, lowest))
    if theirs > 1.1 * ours and len(estimator.sites) < len(lowest):
        named = " ".join(site.short for site in estimator.sites)
        alone = f"{named} alone" if len(estimator.sites) == 1 else named
        recipe = "tiny_sd_level0" if not config.teacher_model else "sd15_level0" if level == 0 else ""
        see = f": see configs/recipes/{recipe}.yaml" if recipe else ""
        lines.append(
            f"-t level{level} makes the UNet {theirs:.2g} times cheaper at {config.width}x{config.height}, {alone} "
            f"{ours:.3g} times{see}"
        )
    if found.total > LONG:
        lines.append(
            f"-y landmarks needs no training at all: python -m sd_hyena generate -y landmarks -W {config.width}"
        )
        if device.type == "cpu" and torch.version.cuda is None and torch.version.hip is None:
            lines.append("this torch is a CPU build; if there is a GPU, python -m sd_hyena.doctor says how to use it")
    return [f"advice: {line}" for line in lines]


def _decided(spec: StudentSpec) -> StudentSpec:
    """The spec with a number where it is left to the teacher's states."""
    option = operator_named(spec.operator).options.get("landmarks")
    price = option and auto_price(spec.options.get("landmarks"), option.default)
    return replace(spec, options=spec.options | {"landmarks": price}) if price else spec
