"""`-t auto`: a short pilot of every site that a student makes cheaper, then the sites that are worth it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from sd_hyena.cost.crossover import speedup
from sd_hyena.distil.candidates import counted
from sd_hyena.distil.placement import own_device, teacher_dtype
from sd_hyena.distil.selection import choose, table, useful
from sd_hyena.models.location import model_path
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import work
from sd_hyena.sites import find_sites
from sd_hyena.students.student import build_student, cast

STEPS = 50  # at least


def with_chosen_sites(config: TrainConfig, train: Callable) -> TrainConfig:
    """Run the pilot by `train` and name the sites that it chooses; they start from its students."""
    path = model_path(config.teacher_model, config.vae)
    device = own_device(config)
    with work(f"{path.name}: counting and timing every site"):
        unet = load_pipeline(path, torch.device("cpu"), torch.float32, config.vae).unet
        total, found = counted(unet, config)
        sites, candidates = {site.short: site for site in find_sites(unet)}, []
        for candidate, spec in found:
            if candidate.saved > 0:
                site = sites[candidate.short]
                attention = unet.get_submodule(site.name).to(device, teacher_dtype(config, device))
                student = cast(build_student(spec), attention.to_q.weight).eval()
                size = site.size(config.height // 8, config.width // 8)
                faster = speedup(site, attention, student, size, batch=2)  # one image with guidance
                candidate = dataclasses.replace(candidate, speedup=faster)
            candidates.append(candidate)
    del unet
    budget = float(config.budget.rstrip("x") or 0)
    tried = useful(candidates, total, budget)
    steps = max(STEPS, config.n_steps // 5)
    print(f"pilot: every site that a student makes cheaper, {steps} steps")
    own = dict(target=",".join(c.short for c in tried), stage="layerwise", max_error=0.0, budget="", n_steps=steps)
    pilot = train(dataclasses.replace(config, **own, save_every_n_steps=0, validate_every_n_steps=0))
    candidates = [
        dataclasses.replace(c, error=pilot.metrics.get(f"val/relative_mse/{c.short}", math.inf)) for c in candidates
    ]
    chosen = choose(candidates, total, config.max_error, budget)
    print(f"\n{table(candidates, chosen, total)}\n")
    names = ",".join(candidate.short for candidate in chosen)
    return dataclasses.replace(config, target=names, max_error=0.0, budget="", pretrained_weight=str(pilot.exported))
