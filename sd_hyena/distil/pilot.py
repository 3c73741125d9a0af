"""`-t auto`: a short pilot of every site that a student makes cheaper, then the sites that are worth it.

The pilot is a run in OUT_DIR/pilot-KEY, whose key tells its options: the same command goes on with it after a stop, and takes
what it found once it is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from sd_hyena.cost.crossover import speedup
from sd_hyena.distil.candidates import counted
from sd_hyena.distil.foretold import cache_of
from sd_hyena.distil.larger_run import LargerRun
from sd_hyena.distil.placement import own_device, teacher_dtype
from sd_hyena.distil.selection import choose, table, useful
from sd_hyena.models.location import model_path, model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import work
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.student import build_student, cast

STEPS = 50  # at least
OF_THE_MACHINE = ("device", "debug", "keep", "name", "out_dir", "log_dir", "cache_dir", "draw_at_once")
STOPPED = "no sites are chosen yet; the same command goes on with the pilot"


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
    pilot = dataclasses.replace(config, **own, save_every_n_steps=0, validate_every_n_steps=0, name="")
    places = dict(out_dir=str(Path(config.out_dir) / f"pilot-{_key(pilot, path)}"), cache_dir=str(cache_of(config)))
    pilot = dataclasses.replace(pilot, **places, resume="" if config.dry_run else "auto")
    students = train(pilot, LargerRun(STOPPED)).exported
    training = load_students(students).training
    if training["metrics_of_step"] != training["step"]:  # it was killed between its last step and its validation
        students = train(dataclasses.replace(pilot, resume=""), LargerRun(STOPPED)).exported
        training = load_students(students).training
    metrics = training["metrics"]
    candidates = [
        dataclasses.replace(c, error=metrics.get(f"val/relative_mse/{c.short}", math.inf)) for c in candidates
    ]
    chosen = choose(candidates, total, config.max_error, budget)
    print(f"\n{table(candidates, chosen, total)}\n")
    names = ",".join(candidate.short for candidate in chosen)
    return dataclasses.replace(config, target=names, max_error=0.0, budget="", pretrained_weight=str(students))


def _key(pilot: TrainConfig, model: Path) -> str:
    """By which a pilot is known again."""
    what = {name: value for name, value in to_dict(pilot).items() if name not in OF_THE_MACHINE}
    return hashlib.sha256(json.dumps([what, model_sha256(model)]).encode()).hexdigest()[:8]
