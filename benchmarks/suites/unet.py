"""A step of Stable Diffusion 1.5's UNet with students at level 0, at 0 and 1, and everywhere, of the default operator and
of its clusters alone, and each site's share of it."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.assignments import Assignments
from benchmarks.harness.gate import TOLERANCE, relative_error, verdict
from benchmarks.harness.layouts import STUDENTS_AT, new_students, predicted_speedups, states, unet_on
from benchmarks.harness.methods import STUDENTS
from benchmarks.harness.peak import gpu_peaks
from benchmarks.harness.rounds import Compared, Spread, compare
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from sd_hyena.cost.operations import unet_flops
from sd_hyena.sites import find_sites
from sd_hyena.students.student import Projections
from sd_hyena.students.swap import swapped

AWKWARD = (16, 24)  # latent cells at which students are checked
ROUNDS_ON_CPU = 3  # a step at 1024 px takes a minute or two there
Passages = dict[str, list[tuple[Any, Any]]]


class Checked(nn.Module):
    """A student that is held against itself in float64 wherever it answers; `worst` is its largest error so far."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student, self.worst = student, 0.0

    def forward(self, x: Tensor, projections: Projections, size: tuple[int, int]) -> Tensor:
        assignments = Assignments(TOLERANCE[x.dtype])
        with assignments.noting():
            answer = self.student(x, projections, size)
        student, *wide = (copy.deepcopy(part).double() for part in (self.student, *projections))
        with assignments.following():
            expected = student(x.double(), Projections(*wide), size)
        self.worst = max(self.worst, relative_error(answer, expected))
        return answer


def error_of_students(unet: nn.Module, setting: Setting, students: Mapping[str, nn.Module]) -> float:
    """The largest error of any student against itself in float64, on what it meets inside the UNet.

    Infinite if the UNet is not, bit for bit, what it was before the swap.
    """
    given, checked = states(unet, setting, AWKWARD, 1), {name: Checked(student) for name, student in students.items()}
    before = unet(**given).sample
    with swapped(unet, checked):
        with_students = unet(**given).sample
    worst = max(one.worst for one in checked.values())
    restored = torch.equal(unet(**given).sample, before) and bool(torch.isfinite(with_students).all())
    return worst if restored else float("inf")


def _mark(setting: Setting) -> Any:
    if setting.on_gpu:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(setting: Setting, passage: tuple[Any, Any]) -> float:
    begin, end = passage
    return begin.elapsed_time(end) / 1e3 if setting.on_gpu else end - begin


def _step(
    unet: nn.Module, setting: Setting, given: dict[str, Any], students: Mapping[str, nn.Module], passages: Passages
) -> None:
    """One forward; when each site was entered and left goes into `passages`."""
    with swapped(unet, students), ExitStack() as stack:
        for site in find_sites(unet):
            begun: list[Any] = []
            enter = lambda *_, begun=begun: begun.append(_mark(setting))
            leave = lambda *_, begun=begun, name=site.short: passages[name].append((begun.pop(), _mark(setting)))
            module = unet.get_submodule(site.name)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(lambda *_, leave=leave: leave() and None).remove)
        unet(**given)


def sides(setting: Setting) -> tuple[int, ...]:
    """Pixels a side."""
    if setting.on_gpu:
        return (512, 1024, 2048) if setting.quick else (512, 1024, 2048, 4096)
    return (256,) if setting.quick else (512, 1024)


@torch.no_grad()
def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """A step (with guidance on a GPU), then its sites."""
    unet = unet_on("sd15", setting.device, setting.dtype)
    sets = {label: new_students(unet, targets, setting) for label, targets in STUDENTS_AT.items()}
    alone = new_students(unet, STUDENTS_AT["level 0+1"], setting, **STUDENTS["clusters, 256"])
    error = max(error_of_students(unet, setting, students) for students in (sets["all"], alone))
    sets["level 0+1, 256 clusters alone"] = alone
    shorts = {site.name: site.short for site in find_sites(unet)}
    for side in sides(setting):
        latent, batch = (side // 8, side // 8), 2 if setting.on_gpu else 1
        given, predicted = states(unet, setting, latent, batch), predicted_speedups(unet, latent, sets)
        whole = unet_flops(unet, latent) * batch
        blank = Row(setting, "unet", (side, side), "step", batch=batch, tokens=latent[0] * latent[1])
        blank = replace(blank, pipeline_cls="UNet2DConditionModel", ckpt_id="SD 1.5 layout, random weights")
        blank = replace(blank, error=error, status=verdict(error, setting.dtype))
        if blank.status != "ok":
            yield blank
            continue
        passages: dict[str, Passages] = {label: defaultdict(list) for label in sets}
        steps = {
            label: partial(_step, unet, setting, given, students, passages[label]) for label, students in sets.items()
        }
        compared = compare(
            steps, "attention", setting, 20.0, rounds=0 if setting.on_gpu or setting.quick else ROUNDS_ON_CPU
        )
        for label, students in sets.items():
            timed, gflop = compared[label], whole / predicted[label] / 1e9
            share = ceilings.seconds(gflop * 1e9, 0) / timed.seconds.median
            row = replace(blank, site=label, compared=timed, predicted=predicted[label], gflop=gflop, roofline=share)
            if setting.on_gpu:
                allocated, reserved = gpu_peaks(steps[label], setting.device)
                row = replace(row, allocated=allocated, reserved=reserved)
            yield row
            replaced = {shorts[name] for name in students}
            for short, seen in passages[label].items():
                spread = Spread.of([_seconds(setting, passage) for passage in seen])
                method = "site, student" if short in replaced else "site, attention"
                yield replace(blank, site=short, method=method, compared=Compared(spread), note=label)
