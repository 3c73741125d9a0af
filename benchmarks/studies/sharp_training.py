"""python -m benchmarks.studies.sharp_training: what training buys where attention is sharper than the shipped model's.

As benchmarks.studies.sharpness, all logits of a site are multiplied, here while students are taught: clusters alone and
Hyena2d, which adds what is by place, each with the same number of clusters, from the same start, on the same states in the
same order, with a training's rates. Judged on states of other captions, before the first step and after the last.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.harness.record import RESULTS, write
from benchmarks.report.plots import read
from benchmarks.studies.sharpness import SITES, exact, sharpened, states
from sd_hyena.distil.module import Distillation
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.sites import Site
from sd_hyena.students.losses import error_and_spread, relative_mse
from sd_hyena.students.student import Student, StudentSpec

OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clusters alone": ("clusters", {"learned": True}),
    "Hyena2d": ("hyena2d", {}),
    "Hyena2d, a separable filter of rank 1": ("hyena2d", {"long": "separable", "rank": 1}),
}
FACTORS = (1, 2, 4)
HELD_OUT = 4  # every fourth state


def judged(student: Student, lessons: list) -> float:
    with torch.no_grad():
        pairs = [error_and_spread(student(x, own, size), target) for x, own, size, target in lessons]
    error, spread = (sum(float(part.sum()) for part in parts) for parts in zip(*pairs, strict=True))
    return error / spread


def taught(student: Student, lessons: list, n_steps: int, batch_size: int, lr: float, lr_projections: float) -> None:
    """With the optimiser and the schedule of `train.py`."""
    rates = dict(lr=lr, lr_projections=lr_projections, schedule="cosine", warmup_steps=20)
    ours = Distillation({student.spec.site: student}, None, n_steps=n_steps, **rates).configure_optimizers()
    optimizer, schedule = ours["optimizer"], ours["lr_scheduler"]["scheduler"]
    order = torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        some = [lessons[i] for i in torch.randint(len(lessons), (batch_size,), generator=order)]
        x, target = torch.cat([x for x, *_ in some]), torch.cat([target for *_, target in some])
        optimizer.zero_grad()
        relative_mse(student(x, *some[0][1:3]), target).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def lessons_of(found: list[tuple], factor: float) -> list:
    """Tokens, the site's sharpened projections, the grid, and what softmax attention answers."""
    lessons = []
    for site, x, own, size in found:
        sharper = sharpened(own, factor)
        for parameter in (p for projection in sharper for p in projection.parameters()):
            parameter.requires_grad_(False)
        with torch.no_grad():
            lessons.append((x, sharper, size, exact(x, sharper, site.heads)))
    return lessons


def built(site: Site, operator: str, options: dict[str, Any], landmarks: int) -> Student:
    torch.manual_seed(0)
    given = {"heads": site.heads, "landmarks": landmarks} | options
    return Student(StudentSpec(site.name, site.short, site.channels, operator, given, None))


def main(
    n_steps: int = 200,
    batch_size: int = 8,
    n_states: int = 64,
    landmarks: int = 128,
    lr: float = 1e-2,
    lr_projections: float = 1e-3,
    only: str = "",
) -> None:
    """Make the rows that are missing, then the table.

    Args:
        n_steps: training steps of a row
        batch_size: states in a step
        n_states: at 256 px, of which a quarter judges
        landmarks: clusters of a head
        lr: learning rate of all but the projections' change
        lr_projections: of that
        only: sites, of IN01 and OUT09, whose name contains this
    """
    config = EvaluationConfig(sizes="256", guidance="5", states=n_states, images=1, device="cpu")
    found = list(states(Examiner(config), (256, 256)))
    rows = read(RESULTS / "sharp_training.csv") if (RESULTS / "sharp_training.csv").exists() else []
    for short in (short for short in SITES if only in short):
        here = [state for state in found if state[0].short == short]
        for factor in FACTORS:
            lessons = lessons_of(here, factor)
            held_out = lessons[HELD_OUT - 1 :: HELD_OUT]
            learned = [lesson for i, lesson in enumerate(lessons) if i % HELD_OUT != HELD_OUT - 1]
            for name, (operator, options) in OPERATORS.items():
                key = {"site": short, "factor": str(factor), "student": name, "landmarks": str(landmarks)}
                key |= {"steps": str(n_steps), "lr": f"{lr:g}", "lr_projections": f"{lr_projections:g}"}
                if any(key.items() <= row.items() for row in rows):
                    continue
                student = built(here[0][0], operator, options, landmarks)
                before = judged(student, held_out)
                taught(student.train(), learned, n_steps, batch_size, lr, lr_projections)
                rows.append(key | {"untrained": f"{before:.2g}", "trained": f"{judged(student.eval(), held_out):.2g}"})
                print(rows[-1], flush=True)
                write("sharp_training", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
