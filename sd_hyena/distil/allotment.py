"""`landmarks=auto`: how many landmarks each site gets, at no more operations than the default number everywhere, or that
of `auto:NUMBER`.

A site whose prediction suffers most from few gets many; one that hardly needs any pays for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sd_hyena.cost.operations import student_flops
from sd_hyena.options.key_values import auto_price
from sd_hyena.options.operators import operator_named
from sd_hyena.sites import Site
from sd_hyena.students.losses import error_and_spread
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.teacher import Condition, Teacher

LADDER = (128, 256, 384, 512)  # that a site may have; fewer serve the size of the states and fail at larger ones
NEGLIGIBLE = 1e-3  # of the errors' sum: where a picture has no more tokens than landmarks, rounding alone differs
CANVAS = 256, 256  # latent cells, 2048 px: where operations are counted, since there they matter


def is_left_open(specs: Sequence[StudentSpec]) -> bool:
    return any(_price(spec) for spec in specs)


def _price(spec: StudentSpec) -> int | None:
    """The number whose operations are not to be exceeded; None where a number is given."""
    option = operator_named(spec.operator).options.get("landmarks")
    return option and auto_price(spec.options.get("landmarks"), option.default)


def allotted(
    specs: Sequence[StudentSpec], teacher: Teacher, states: dict[str, Any], sites: Sequence[Site]
) -> list[StudentSpec]:
    """The specs with a number each. `states` is a batch of held-out ones: "latents", "timestep", "text".

    Each number at each site is tried as its student starts, alone in the UNet; what it costs is the error of the prediction.
    From the least everywhere on, the next step is taken where it lowers the errors' sum most for its operations.
    """
    given = _on_device(states, next(teacher.unet.parameters()).device)
    with torch.no_grad():
        truth = teacher.observe(*given).prediction
    price = _price(specs[0])
    size_of = {site.name: site.size(*CANVAS) for site in sites}
    errors, costs = {}, {}
    for spec in specs:
        for count in LADDER:
            one = with_count(spec, count)
            costs[spec.site, count] = student_flops(one, size_of[spec.site])
            errors[spec.site, count] = _error(teacher, one, given, truth)
    equal = sum(student_flops(with_count(spec, price), size_of[spec.site]) for spec in specs)
    chosen = chosen_counts([spec.site for spec in specs], errors, costs, equal)
    return [with_count(spec, chosen[spec.site]) for spec in specs]


def chosen_counts(
    sites: Sequence[str], errors: dict[tuple[str, int], float], costs: dict[tuple[str, int], int], budget: int
) -> dict[str, int]:
    """From errors and operations of each site at each number of the ladder; the sum of the operations is within the budget,
    if the least of the ladder is."""
    rung = dict.fromkeys(sites, 0)
    left = budget - sum(costs[site, LADDER[0]] for site in sites)
    least = NEGLIGIBLE * sum(errors[site, LADDER[0]] for site in sites)
    while True:
        steps = []
        for site, at in rung.items():
            for further in range(at + 1, len(LADDER)):
                gain = errors[site, LADDER[at]] - errors[site, LADDER[further]]
                price = costs[site, LADDER[further]] - costs[site, LADDER[at]]
                if gain > least and price <= left:
                    steps.append((gain / max(price, 1), site, further, price))
        if not steps:
            return {site: LADDER[at] for site, at in rung.items()}
        _, site, further, price = max(steps)
        rung[site] = further
        left -= price


def with_count(spec: StudentSpec, count: int) -> StudentSpec:
    """A spec with so many landmarks of a head."""
    sample = {"sample": max(count, spec.options["sample"])} if "sample" in spec.options else {}
    return replace(spec, options=spec.options | {"landmarks": count} | sample)


def _on_device(states: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor, Condition]:
    text = {name: value.to(device) for name, value in states["text"].items()}
    return states["latents"].to(device), states["timestep"].to(device), text


@torch.no_grad()
def _error(teacher: Teacher, spec: StudentSpec, given: tuple[Tensor, Tensor, Condition], truth: Tensor) -> float:
    student = build_student(spec).to(truth.device).eval()
    answer = teacher.observe(*given, {spec.site: student}).prediction
    error, spread = error_and_spread(answer.flatten(2).mT, truth.flatten(2).mT)
    return float(error.sum() / spread.sum())
