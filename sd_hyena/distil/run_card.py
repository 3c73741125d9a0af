"""What a run says of itself: before, what it will take; after, what it gained."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from sd_hyena.cost.timing import block_seconds, wait_for
from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.module import Distillation
from sd_hyena.files.names import for_a_shell
from sd_hyena.options.train_config import NEWEST, TrainConfig
from sd_hyena.processes.memory import peak_gib
from sd_hyena.processes.ranks import say
from sd_hyena.students.student import cast
from sd_hyena.students.teacher import Teacher


@dataclass
class Outcome:
    """What a run left: its folder, the exported file, its last validation, and block times in seconds."""

    folder: Path
    exported: Path | None
    metrics: dict[str, float]
    block_seconds: dict[str, tuple[float, float]]  # site -> attention, student


def print_estimate(module: Distillation, data: Lessons, n_steps: int, device: torch.device) -> None:
    """Measure one micro-batch, forward and backward, and say what so many steps will take."""
    config = data.config
    module.to(device)
    data.teacher.to(device)
    states = next(iter(DataLoader(data.stream(), batch_size=data.micro_batch_size)))
    started = time.perf_counter()
    batch = data.on_after_batch_transfer(data.transfer_batch_to_device(states, device, 0), 0)
    wait_for(device)
    taught = time.perf_counter() - started
    sum(module.stage.errors(module.by_site(), batch).values()).backward()
    wait_for(device)
    module.zero_grad(set_to_none=True)
    seconds = (time.perf_counter() - started) * data.accumulate * n_steps
    say(
        f"measured: {seconds / 60:.1f} min for {n_steps} steps of batch {config.batch_size} at "
        f"{config.width}x{config.height} on {device.type} (teacher {taught * data.accumulate:.2f} s a step), "
        f"peak memory {peak_gib(device):.1f} GiB, {sum(p.numel() for p in module.parameters()):,} parameters"
    )


def block_times(
    teacher: Teacher, module: Distillation, data: Lessons, device, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Median seconds of each site's attention and of its student at the training size, one image with guidance."""
    result = {}
    module.to(device)
    for site in teacher.sites:
        attention = teacher.unet.get_submodule(site.name)
        student = cast(copy.deepcopy(module.by_site()[site.name]), next(attention.parameters())).eval()
        result[site.short] = block_seconds(attention, student, site.size(*data.latent_size), 2, rounds)
    return result


def print_card(outcome: Outcome, config: TrainConfig, untrained: dict[str, float], alone: bool = True) -> None:
    """`untrained` is each site's error before the first step. A run that is not `alone` names no next command."""
    print()
    for short, (attention, student) in outcome.block_seconds.items():
        error = outcome.metrics.get(f"val/relative_mse/{short}", float("nan"))
        before = untrained.get(short)
        was = "" if before is None else f" (untrained {before:.2g})"
        print(
            f"{short}: relative error {error:.2g}{was}; block {attention * 1e3:.1f} ms -> {student * 1e3:.1f} ms "
            f"at {config.width}x{config.height}"
        )
    for short, before in untrained.items():
        if (after := outcome.metrics.get(f"val/relative_mse/{short}", 0.0)) > before:
            print(
                f"warning: {short} is worse than untrained ({after:.2g}, was {before:.2g}): train longer, or lower --lr"
            )
    if "val/image_psnr" in outcome.metrics:
        print(f"image against the teacher's: PSNR {outcome.metrics['val/image_psnr']:.1f} dB")
    if not alone:
        print(f"student: {outcome.exported}")
        return
    model = f" -m {for_a_shell(config.teacher_model)}" if config.teacher_model else ""
    model += f" --vae {for_a_shell(config.vae)}" if config.vae else ""
    size = f"-W {config.width}" + (f" -H {config.height}" if config.height != config.width else "")
    newest = outcome.exported if config.dry_run else Path(config.out_dir) / f"{config.name or NEWEST}.pt"
    print(f"student: {outcome.exported}, newest: {newest}")
    print(f"next: python -m sd_hyena generate{model} -y {for_a_shell(newest)} {size} --compare")
