"""What a training would take, told without beginning one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_hyena.distil.estimate import Estimator, advice
from sd_hyena.distil.placement import own_device
from sd_hyena.distil.sources import Source
from sd_hyena.errors import BadInput
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import spec_for


def foretold(pipe: Any, config: TrainConfig) -> list[str]:
    """The estimate and the advice that a run of `config` begins with; `pipe` is its teacher's. Raises BadInput."""
    if config.target == "auto":
        raise BadInput("target=auto runs a pilot first, and its estimate comes then; name sites for one now")
    path, device = model_path(config.teacher_model, config.vae), own_device(config)
    sites = select(find_sites(pipe.unet), config.target)
    size = (config.height // 8, config.width // 8)
    specs = [spec_for(site, config.operator, config.options_of_operator(), size) for site in sites]
    cache = Path(config.cache_dir or Path(config.out_dir) / "cache")
    missing = Source.of(config, prompts_of(path, config.prompts), model_sha256(path), cache).missing
    estimator = Estimator(pipe, config, sites, specs)
    found = estimator.estimate(missing, device, config.n_steps)
    return [found.line(device), *advice(found, estimator, device)]
