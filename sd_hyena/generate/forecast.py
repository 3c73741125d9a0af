"""What a config will do and cost, told before a model is loaded: its tiles, its students, counted operations, memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sd_hyena.cost.operations import attention_flops, student_flops, unet_flops, vae_flops
from sd_hyena.cost.peak import unet_peak_bytes
from sd_hyena.generate.alternatives import joined_students, students_of
from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.drawing import denoising_steps
from sd_hyena.large.tiling import Size, grid
from sd_hyena.models.hollow import COUNTING, hollow_network
from sd_hyena.models.location import model_path
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.processes.device import pick_device, pick_dtype
from sd_hyena.processes.progress import Work
from sd_hyena.sites import find_sites

LARGEST = 512  # cells of a side up to which memory is counted


@dataclass(frozen=True)
class Forecast:
    """Of one picture: operations with students and without, GiB that a step has in hand beside the weights (None: not
    counted), the calls of the UNet in a step, the sites with students; and of the whole the pictures and what is on."""

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
    unet, arrangement = hollow_network(model, "unet"), Arrangement.of(config)
    canvas = config.height // 8, config.width // 8
    views = _views(arrangement, canvas)
    specs: Mapping[str, Any] = {}
    if config.hyena:
        first = given_path.alternatives(config.hyena)[0]
        stored = {name: students_of(name, unet, arrangement.tile, config.target, torch.empty(0)) for name in first}
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
    vae = 0 if config.vae else vae_flops(hollow_network(model, "vae"), canvas)[1]
    device = pick_device(config.device)
    dtype = torch.bfloat16 if "bf16" in config.optimizations else pick_dtype(config.dtype, device)
    largest = max(views, key=lambda size: size[0] * size[1])
    batch = (1 + (config.cfg_scale > 1)) * config.batch_size * min(config.tile_batch_size, max(views.values()))
    gib = _peak(model, largest, batch, dtype) / 2**30 if max(largest) <= LARGEST else None
    return Forecast(
        operations=steps * (whole - saved) + vae,
        as_teacher=steps * whole + vae,
        gib=gib,
        weights_gib=sum(p.numel() for p in unet.parameters()) * dtype.itemsize / 2**30,
        calls=sum(views.values()),
        sites=tuple(sites[name].short for name in sites if name in specs),
        pictures=config.num_images * config.iteration,
        arrangement=str(arrangement),
    )


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


@lru_cache(maxsize=64)
def _peak(model: Any, size: Size, batch: int, dtype: torch.dtype) -> int:
    return unet_peak_bytes(hollow_network(model, "unet"), size, batch, dtype)


_students: dict[tuple[str, Size], int] = {}


def _student(key: str, size: Size, spec: Any) -> int:
    if (key, size) not in _students:
        _students[key, size] = student_flops(spec, size)
    return _students[key, size]
