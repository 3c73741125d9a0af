"""What a config will do and cost, told before a model is loaded: its tiles, its students, counted operations, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops, vae_flops
from sd_hyena.cost.peak import unet_peak_bytes
from sd_hyena.generate.alternatives import joined_students, students_of
from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.drawing import denoising_steps
from sd_hyena.generate.growth import Stage
from sd_hyena.generate.order import dtype_of
from sd_hyena.large.tiling import Size, grid
from sd_hyena.models.hollow import COUNTING, hollow_network
from sd_hyena.models.location import model_path
from sd_hyena.options import given_path
from sd_hyena.options.effect import is_on
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.growing import STAGED, method_of, own_side
from sd_hyena.options.landmarks import Landmarks
from sd_hyena.processes.device import pick_device
from sd_hyena.processes.progress import Work
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import StudentFile

LARGEST = 512  # cells of a side up to which memory is counted


@dataclass(frozen=True)
class Forecast:
    """Of one picture: operations of all its stages with students and without, GiB that a step has in hand beside the
    weights (None: not counted), the calls of the UNet in a step of the last, its sites with students; and of the whole
    the pictures and what is on."""

    operations: int
    as_teacher: int
    gib: float | None
    weights_gib: float
    calls: int
    sites: tuple[str, ...]
    pictures: int
    arrangement: str

    def line(self, rate: float | None = None) -> str:
        """For a person; `rate` are the operations a second of this machine, if it is known."""
        parts = [self.arrangement or "in one piece"]
        if self.sites:
            cheaper = self.as_teacher / self.operations
            parts.append(f"students at {' '.join(self.sites)}: {cheaper:.2f} times cheaper than attention")
        else:
            parts.append("no students: attention everywhere")
        parts.append(f"{self.operations / 1e12:.3g} TFLOP a picture")
        if self.gib is not None:
            parts.append(
                f"about {self.weights_gib + self.gib:.2f} GiB ({self.weights_gib:.2f} of it the UNet's weights)"
            )
        if rate:
            seconds = self.pictures * self.operations / rate
            several = f" for {self.pictures} pictures" if self.pictures > 1 else ""
            parts.append(f"about {Work.seconds_said(seconds)}{several}, at the speed of the last picture")
        return " · ".join(parts)


def forecast(config: GenerateConfig) -> Forecast:
    """Counted on the model's configuration alone. Raises BadInput."""
    with COUNTING:
        return _counted(config)


def _counted(config: GenerateConfig) -> Forecast:
    model = model_path(config.model, config.vae)
    unet, own = hollow_network(model, "unet"), own_side(config.model)
    dtype = dtype_of(config, pick_device(config.device))
    method = method_of(config, own)
    if method == "off":
        stages = [_Counted.of(config, Arrangement.of(config), model, dtype)]
    else:
        plain = replace(config, lora="", controlnet="", control_image="", control_scale=1.0)  # which need not be read
        found = Stage.all_of(plain, own, method)
        stages = [_Counted.of(stage.config, stage.arrangement, model, dtype, stage) for stage in found]
    peaks = [stage.gib for stage in stages]
    last = stages[-1]
    return Forecast(
        operations=sum(stage.operations for stage in stages),
        as_teacher=sum(stage.as_teacher for stage in stages),
        gib=None if None in peaks else max(peaks),
        weights_gib=sum(p.numel() for p in unet.parameters()) * dtype.itemsize / 2**30,
        calls=last.calls,
        sites=last.sites,
        pictures=config.num_images * config.iteration,
        arrangement=", ".join(filter(None, (_stages_said(stages, method), last.arrangement, _not_counted(config)))),
    )


@dataclass(frozen=True)
class _Counted:
    """One stage of a picture."""

    config: GenerateConfig
    operations: int
    as_teacher: int
    gib: float | None
    calls: int
    sites: tuple[str, ...]
    arrangement: str

    @classmethod
    def of(
        cls,
        config: GenerateConfig,
        arrangement: Arrangement,
        model: Path,
        dtype: torch.dtype,
        stage: Stage | None = None,
    ) -> _Counted:
        unet, canvas = hollow_network(model, "unet"), (config.height // 8, config.width // 8)
        views, way = _views(arrangement, canvas), stage.way if stage and stage.i else ""
        if way == "demofusion":
            views = views | _samples(canvas, stage.options()["dilation"], views)
        specs: Mapping[str, Any] = {}
        if config.hyena:
            first = given_path.alternatives(config.hyena)[0]
            stored = {name: _students_of(name, model, arrangement.tile, config.target) for name in first}
            (alternative,) = joined_students("+".join(first), stored)
            specs = {site: student.spec for site, student in alternative.students.items()}
        sites = {site.name: site for site in find_sites(unet)}
        whole = saved = 0
        for size, count in views.items():
            whole += count * _unet(model, size)
            for name, spec in specs.items():
                own = sites[name].size(*size)
                saved += count * (attention_flops(sites[name], own) - _student(repr(spec), own, spec))
        steps = (denoising_steps(config) + config.noise_inversion) * (1 + (config.cfg_scale > 1))
        encode, decode = (0, 0) if config.vae else _vae(model, canvas)
        vae = decode + encode * bool(config.init_image and way != "demofusion")
        if way == "diffusehigh":
            vae += min(stage.options()["steps"], denoising_steps(config)) * (decode + encode)
        largest = max(views, key=lambda size: size[0] * size[1])
        batch = (1 + (config.cfg_scale > 1)) * config.batch_size * min(config.tile_batch_size, max(views.values()))
        return cls(
            config=config,
            operations=steps * (whole - saved) + vae,
            as_teacher=steps * whole + vae,
            gib=_peak(model, largest, batch, dtype) / 2**30 if max(largest) <= LARGEST else None,
            calls=sum(views.values()),
            sites=tuple(sites[name].short for name in sites if name in specs),
            arrangement=str(arrangement),
        )


def _stages_said(stages: Sequence[_Counted], method: str) -> str:
    """How a picture grows; empty if it does not."""
    if len(stages) == 1 and method in ("off", *STAGED):
        return ""
    if len(stages) == 1:
        return f"grows by {method}: counted as drawn plainly, so at most"
    way = " -> ".join(
        f"{stage.config.width}x{stage.config.height} ({denoising_steps(stage.config)} steps)" for stage in stages
    )
    return f"grows by {method} in {len(stages)} stages: {way}"


def _not_counted(config: GenerateConfig) -> str:
    used = config.upscaler and (config.init_image or is_on(config, "grow:enlarging"))
    return "the upscaler's own work not counted" if used else ""


def _samples(canvas: Size, dilation: int, views: Mapping[Size, int]) -> dict[Size, int]:
    """How many pieces of the sizes of dilated samples there are with those."""
    found: dict[Size, int] = {}
    for top in range(min(dilation, canvas[0])):
        for left in range(min(dilation, canvas[1])):
            size = -(-(canvas[0] - top) // dilation), -(-(canvas[1] - left) // dilation)
            found[size] = found.get(size, views.get(size, 0)) + 1
    return found


def _views(arrangement: Arrangement, canvas: Size) -> dict[Size, int]:
    """How many pieces of each size the UNet meets in a step."""
    tiles = arrangement.tiles
    if tiles is None:
        return {canvas: 1}
    rects = grid(canvas, (tiles.tile_height, tiles.tile_width), tiles.overlap)
    covered = torch.zeros(canvas, dtype=torch.bool)
    regions = [region.rect(canvas) for region in tiles.regions if region.enable]
    for top, left, height, width in regions:
        covered[top : top + height, left : left + width] = True
    if regions and not tiles.draw_background:
        rects = [r for r in rects if not covered[r.top : r.top + r.height, r.left : r.left + r.width].all()]
    found: dict[Size, int] = {}
    for rect in (*rects, *regions):
        found[rect[2:]] = found.get(rect[2:], 0) + 1
    return found or {canvas: 1}


@lru_cache(maxsize=64)
def _unet(model: Any, size: Size) -> int:
    return unet_flops(hollow_network(model, "unet"), size)


def _students_of(name: str, model: Path, tile: Size | None, target: str) -> StudentFile:
    return _landmarks(name, model, tile) if Landmarks.read(name) else _read(name, model, tile, target)


def _read(name: str, model: Path, tile: Size | None, target: str) -> StudentFile:
    return students_of(name, hollow_network(model, "unet"), tile, target, torch.empty(0))


@lru_cache(maxsize=64)
def _landmarks(name: str, model: Path, tile: Size | None) -> StudentFile:
    """Which no file is behind, so that it is the same again."""
    return _read(name, model, tile, "")


@lru_cache(maxsize=64)
def _vae(model: Any, canvas: Size) -> tuple[int, int]:
    return vae_flops(hollow_network(model, "vae"), canvas)


@lru_cache(maxsize=64)
def _peak(model: Any, size: Size, batch: int, dtype: torch.dtype) -> int:
    return unet_peak_bytes(hollow_network(model, "unet"), size, batch, dtype)


_students: dict[tuple[str, Size], int] = {}


def _student(key: str, size: Size, spec: Any) -> int:
    if (key, size) not in _students:
        _students[key, size] = folded_flops(spec, size)
    return _students[key, size]
