"""The shipped model end to end: sampling with guidance, and the VAE, with attention and with untrained students."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from benchmarks.harness.gate import relative_error, verdict
from benchmarks.harness.layouts import STUDENTS_AT, new_students
from benchmarks.harness.rounds import compare
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.swap import swapped

PROMPT = "a red circle on blue"


def _latents(pipe, students, side: int, steps: int) -> torch.Tensor:
    noise = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    with swapped(pipe.unet, students):
        return pipe(
            PROMPT,
            latents=noise.to(pipe.device, pipe.dtype),  # drawn here, for other dtypes draw other noise
            width=side,
            height=side,
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="latent",
        ).images


def error_of_latents(pipe, students, dtype: torch.dtype) -> float:
    """Of one step's latents at 128 px against the whole pipeline in float64."""
    wide = copy.deepcopy(pipe).to(torch.float64)
    doubled = {name: copy.deepcopy(student).double() for name, student in students.items()}
    return relative_error(_latents(pipe, students, 128, 1), _latents(wide, doubled, 128, 1))


@torch.no_grad()
def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Sampling, the VAE, and both; ratios are against the same with attention."""
    pipe = load_pipeline(SHIPPED_MODEL, setting.device, setting.dtype)
    sets = {label: new_students(pipe.unet, targets, setting) for label, targets in STUDENTS_AT.items()}
    errors = {label: error_of_latents(pipe, students, setting.dtype) for label, students in sets.items()}
    steps = 4 if setting.quick else 20
    for side in (128, 256) if setting.quick else (256, 512, 1024):
        latents = _latents(pipe, {}, side, 1) / pipe.vae.config.scaling_factor
        blank = Row(
            setting, "image", (side, side), "", steps=steps, pipeline_cls=type(pipe).__name__, ckpt_id="tiny_sd"
        )
        sampling = {label: partial(_latents, pipe, students, side, steps) for label, students in sets.items()}
        calls = sampling | {"VAE": lambda latents=latents: pipe.vae.decode(latents)}
        compared = compare(calls, "attention", setting, 5.0 if setting.quick else 60.0)
        for label, error in errors.items():
            status = verdict(error, setting.dtype)
            timed = compared[label] if status == "ok" else None
            method = f"sampling, {label}" if label == "attention" else f"sampling, students at {label}"
            yield replace(blank, site=f"{steps} steps", method=method, error=error, status=status, compared=timed)
        yield replace(blank, site=f"{steps} steps", method="VAE", compared=compared["VAE"])
