"""What a training would take, told before anything of it is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sd_hyena.distil.estimate import Estimate, Estimator, advice
from sd_hyena.distil.placement import own_device
from sd_hyena.distil.sources import Source
from sd_hyena.errors import BadInput
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import Work
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import spec_for


def foretold(
    pipe: Any, config: TrainConfig, n_steps: int | None = None, followed_by: Sequence[TrainConfig] = ()
) -> list[str]:
    """The estimate and the advice that a run of `config` begins with, `n_steps` of it to go (None: all), and the sum with
    those that follow it; `pipe` is its teacher's. Raises BadInput."""
    if config.target == "auto":
        raise BadInput("target=auto runs a pilot first, and its estimate comes then; name sites for one now")
    device, made = own_device(config), set()
    estimator = _estimator(pipe, config)
    found = _estimate(estimator, device, config.n_steps if n_steps is None else n_steps, made)
    lines = [found.line(device), *advice(found, estimator, device)]
    if followed_by:
        rest = [_estimate(_estimator(pipe, one), device, one.n_steps, made, found.rate) for one in followed_by]
        each = ", ".join(
            f"{one.stage} {one.width}x{one.height} {Work.seconds_said(its.total)}"
            for one, its in zip((config, *followed_by), (found, *rest), strict=True)
        )
        total = found.total + sum(its.total for its in rest)
        lines.insert(1, f"all {1 + len(rest)} stages from here on: about {Work.seconds_said(total)}: {each}")
    return lines


def cache_of(config: TrainConfig) -> Path:
    """Where a run keeps what its teacher drew."""
    return Path(config.cache_dir or Path(config.out_dir) / "cache")


def _estimator(pipe: Any, config: TrainConfig) -> Estimator:
    sites = select(find_sites(pipe.unet), config.target)
    size = (config.height // 8, config.width // 8)
    specs = [spec_for(site, config.operator, config.options_of_operator(), size) for site in sites]
    return Estimator(pipe, config, sites, specs)


def _estimate(
    estimator: Estimator, device: torch.device, n_steps: int, made: set[tuple], rate: float | None = None
) -> Estimate:
    """Pictures that a stage before has `made` are not missing."""
    config = estimator.config
    path = model_path(config.teacher_model, config.vae)
    prompts = prompts_of(path, config.prompts)
    wanted = tuple(getattr(config, n) for n in ("data", "data_path", "width", "height", "num_samples", "sample_steps"))
    missing = 0 if wanted in made else Source.missing_of(config, prompts, model_sha256(path), cache_of(config))
    made.add(wanted)
    return estimator.estimate(missing, device, n_steps, rate)
