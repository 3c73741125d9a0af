"""The straight line from a GenerateConfig to image files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sd_hyena.files.names import writable_folder
from sd_hyena.generate.alternatives import Alternative, check_sizes, keep_attention, load_alternatives
from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.generate.job import Job
from sd_hyena.generate.offload import check_offload, offload
from sd_hyena.generate.optimize import check_optimize, optimized
from sd_hyena.generate.task import Task
from sd_hyena.models.pipeline import (
    load_pipeline,
    model_path,
    model_sha256,
    pick_device,
    pick_dtype,
    prompts_of,
)
from sd_hyena.models.vae import check_vae
from sd_hyena.options.command_line import check_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.rules import drawn_seed
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.processes.group import Group, joined, own_device
from sd_hyena.processes.ranks import say
from sd_hyena.text.encoding import chunks, weighted_prompts
from sd_hyena.text.textual_inversion import load_embeddings, read_embeddings, with_bundled

KERNELS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


class NotDrawn(RuntimeError):
    """Some images failed; the others are written."""


def generate(config: GenerateConfig) -> list[Path]:
    """Write all images and return their paths; of several processes (group.py) the first returns them, the others none.

    Raises BadInput before anything is drawn, NotDrawn if an image failed.
    """
    check_paths(config)
    path = model_path(config.model)
    if config.vae:
        check_vae(config.vae)
    folder = writable_folder(config.out_dir)
    task, arrangement = Task.of(config), Arrangement.of(config)
    embeddings = read_embeddings(config.embeddings)
    if said := str(arrangement):
        say(said)
    device = pick_device(own_device(config.device))
    check_offload(config.offload, device)
    check_optimize(config.optimizations, device)
    dtype = torch.bfloat16 if "bf16" in config.optimizations else pick_dtype(config.dtype, device)
    prompt = prompts_of(path)[0] if config.prompt is None else config.prompt
    with joined(device) as group, ExitStack() as stack:
        config = replace(config, seed=group.agreed(drawn_seed(config.seed)), prompt=prompt)
        at_first = device if config.offload == "off" else torch.device("cpu")
        pipe = load_pipeline(path, at_first, dtype, config.vae)
        set_scheduler(pipe, config.scheduler, config.karras)
        alternatives = load_alternatives(config.hyena, pipe.unet, config.target) or [Alternative({})]
        sha256 = model_sha256(path)
        for alternative in alternatives:
            if any(hash_ and hash_ != sha256 for hash_ in alternative.teacher_sha256):
                say(
                    f"note: {alternative.label} was trained on another model; its change is added to this one's projections"
                )
            check_sizes(alternative, pipe.unet, arrangement.tile)
        if config.keep_attention:
            kept = arrangement.tile, config.batch_size * (1 + (config.cfg_scale > 1))
            alternatives = [_keeping(group, one, pipe.unet, config.keep_attention, *kept) for one in alternatives]
        load_embeddings(pipe, with_bundled(embeddings, (one.lora for one in task.loras)))
        _note_long_prompt(pipe, prompt)
        stack.enter_context(task.with_loras(pipe))
        pipe, given = task.prepared(pipe)
        students = [student for alternative in alternatives for student in alternative.students.values()]
        if config.offload != "off":
            offload(pipe, config.offload, device, students)
        total = config.num_images * config.iteration
        rows, together = _shares(group, total, arrangement)
        job = Job(pipe, config, given, arrangement, folder, path.name, sha256, rows, together)
        with (
            _attention_backend(config.attention_backend),
            weighted_prompts(pipe, config.clip_skip),
            optimized(pipe.unet, config.optimizations, students),
            arrangement.around(pipe, together.map),
        ):
            written = [image for h, alternative in enumerate(alternatives) for image in job.write(h, alternative)]
        everywhere = zip(*group.gathered((written, [] if together.rank else job.failed)), strict=True)
        written, failed = ([one for part in parts for one in part] for parts in everywhere)
    if failed:
        raise NotDrawn(
            f"{len(failed)} of {len(alternatives) * total} images failed, the others are in {folder}; {failed[0]}"
        )
    return [path for _, paths in sorted(written) for path in paths] if group.rank == 0 else []


def _keeping(group: Group, alternative: Alternative, unet: Any, wanted: str, tile: tuple, batch: int) -> Alternative:
    """The same sites keep their attention in all processes: the first one measures."""
    if group.rank == 0:
        alternative = keep_attention(alternative, unet, wanted, tile, batch)
    kept = group.agreed(",".join(alternative.kept))
    return alternative if group.rank == 0 else keep_attention(alternative, unet, kept, tile, batch)


def _shares(group: Group, total: int, arrangement: Arrangement) -> tuple[range, Group]:
    """Which images this process draws, and with whom: each by itself, or all together where there are fewer images."""
    if total >= group.size:
        return range(total)[group.rank :: group.size], Group()
    if arrangement.tiles is None:
        say(f"note: {total} images in one piece keep {total} of {group.size} processes busy; draw more, or in tiles")
        return range(total)[group.rank :: group.size], Group()
    return range(total), group


@contextmanager
def _attention_backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, KERNELS[name])):
        yield


def _note_long_prompt(pipe: Any, prompt: str) -> None:
    count = len(chunks(prompt, pipe.tokenizer))
    if count > 1:
        say(f"note: the prompt is read in {count} chunks of {pipe.tokenizer.model_max_length - 2} tokens")
