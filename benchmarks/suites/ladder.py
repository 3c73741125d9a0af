"""The steps of --optimize, one more at each rung, in diffusion-fast's order, with attention and with students."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor

from benchmarks.harness.gate import relative_error
from benchmarks.harness.layouts import new_students, states, unet_on
from benchmarks.harness.peak import gpu_peaks
from benchmarks.harness.rounds import Compared, compare
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from sd_hyena.errors import BadInput
from sd_hyena.generate.optimize import check_optimize, optimized
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.swap import swapped

RUNGS = (("bf16",), ("sdpa",), ("channels_last", "compile"), ("qkv",), ("int8",))  # each beside those before it
APART = {"graphs": ("bf16", "sdpa", "channels_last", "graphs"), "halves": ("bf16", "sdpa", "halves")}
WORST = {"int8": 0.15, "bf16": 0.06, "": 1e-4}  # error of a step's prediction, by the roughest step taken
BUDGET = 3.0  # seconds of timing for a rung
STUDENTS = {"attention": "", "students at the finest level": "level0"}


def _ladder() -> dict[str, tuple[str, ...]]:
    rungs = {"float32, plain attention": ()}
    for n, steps in enumerate(RUNGS, 1):
        rungs[f"+ {', '.join(steps)}"] = tuple(itertools.chain(*RUNGS[:n]))
    return rungs | APART


def _models(setting: Setting) -> Iterator[tuple[str, str, torch.nn.Module, int]]:
    """Name, what the finest level with attention is called, UNet in float32, pixels a side."""
    if setting.quick or not setting.on_gpu:
        tiny = UNet2DConditionModel.from_pretrained(SHIPPED_MODEL / "unet")
        yield "tiny_sd", "level0", torch.nn.Module.to(tiny, setting.device, torch.float32).eval(), 256
    if not setting.quick:
        yield "SD 1.5 layout", "level0", unet_on("sd15", setting.device), 1024 if setting.on_gpu else 512
    if setting.on_gpu and not setting.quick:
        yield "SDXL layout", "level1", unet_on("sdxl", setting.device), 1024


@torch.no_grad()
def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Rungs follow one another, for each compiles anew; the first step, compilation included, is told in the note."""
    setting = replace(setting, dtype=torch.float32)
    for name, finest, unet, side in _models(setting):
        unet.requires_grad_(False)
        given = states(unet, setting, (side // 8, side // 8), 2)
        before = {module: module.processor for module in unet.modules() if hasattr(module, "set_processor")}
        for label, targets in STUDENTS.items():
            students = new_students(unet, finest if targets else "", setting)
            with ExitStack() as bottom:
                bottom.enter_context(swapped(unet, students))
                for module, processor in before.items():
                    module.set_processor(AttnProcessor())
                    bottom.callback(module.set_processor, processor)
                expected = unet(**given).sample
                blank = Row(
                    setting, "ladder", (side, side), "", site=label, batch=2, pipeline_cls="UNet2DConditionModel"
                )
                blank = replace(blank, ckpt_id=name)
                for rung, steps in _ladder().items():
                    row = replace(blank, method=rung, optimize=steps)
                    try:
                        check_optimize(steps, setting.device)
                    except BadInput as why:
                        yield replace(row, status=f"skipped: {why}")
                        continue
                    yield _timed(row, unet, given, students, expected)


def _timed(row: Row, unet, given, students, expected) -> Row:
    steps, setting = row.optimize, row.setting
    with optimized(unet, steps, students.values()):
        started = time.perf_counter()
        error = relative_error(unet(**given).sample, expected)
        first = time.perf_counter() - started
        worst = WORST[next((step for step in ("int8", "bf16") if step in steps), "")]
        row = replace(row, error=error, note=f"first step {first:.1f} s")
        if error > worst:
            return replace(row, status=f"failed: error {error:.1e}")
        timed = Compared(compare({"rung": lambda: unet(**given)}, "rung", setting, BUDGET)["rung"].seconds)
        if setting.on_gpu:
            allocated, reserved = gpu_peaks(lambda: unet(**given), setting.device)
            row = replace(row, allocated=allocated, reserved=reserved)
    return replace(row, compared=timed)
