"""python -m benchmarks.studies.sharpness: what needs no training, on real states whose attention is made sharper.

The shipped model's attention is soft; a published one's may not be. So all logits of a site are multiplied by 1, 2 and 4, and
each untrained operator is held against the exact softmax of the same logits. Two sites of level 0, the least and the most
even ones; errors are relative to the spread of the site's answer. Cost: operations of one SD 1.5 block at 2048 px, as in
benchmarks.studies.quality. A second table: how the error falls with the number of landmarks at 1024, 4096 and 16384 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers  # noqa: F401  (registers them)
from benchmarks.harness.record import RESULTS, write
from benchmarks.report.plots import read
from sd_hyena.cost.operations import folded_flops
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.evaluate.sharpness import entropy
from sd_hyena.sites import Site, select
from sd_hyena.students.losses import error_and_spread
from sd_hyena.students.student import Projections, StudentSpec, spec_for
from sd_hyena.students.teacher import Teacher
from sd_hyena.students.untrained import Untrained

SITES, FACTORS = ("IN01", "OUT09"), (1, 2, 4)
SD15, CELLS = Site("IN01", "IN01", 320, 8, 0), (256, 256)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"clusters, {m}": ("clusters", {"landmarks": m}) for m in (64, 128, 256, 512)},
    **{f"k-means landmarks, {m}": ("kmeans", {"landmarks": m}) for m in (64, 128, 256)},
    **{f"Nystromformer's block means, {m}": ("nystromformer", {"landmarks": m}) for m in (64, 128, 256)},
    **{f"tokens gathered by random queries, {m}": ("landmarks", {"landmarks": m}) for m in (64, 128, 256)},
    "ToMe, half of the tokens merged": ("tome", {}),
    "ToDo, keys and values pooled 2x2": ("todo", {}),
    "CLEAR, radius 8": ("clear", {"radius": 8}),
    "CLEAR, radius 16": ("clear", {"radius": 16}),
    "windows of 8x8": ("windows", {"window": 8}),
    "windows of 16x16 (HyperTile, 128 px)": ("windows", {"window": 16}),
}


def sharpened(projections: Projections, factor: float) -> Projections:
    """Whose queries, and so all logits, are so many times as large."""
    to_q = projections.to_q
    sharper = nn.Linear(to_q.in_features, to_q.out_features, bias=to_q.bias is not None)
    with torch.no_grad():
        sharper.weight.copy_(factor * to_q.weight)
        if to_q.bias is not None:
            sharper.bias.copy_(factor * to_q.bias)
    return projections._replace(to_q=sharper)


def exact(x: Tensor, projections: Projections, heads: int) -> Tensor:
    """The site's own softmax attention."""
    q, k, v = (project(x).unflatten(-1, (heads, -1)).transpose(1, 2) for project in projections[:3])
    return projections.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def untrained(site: Site, operator: str, options: dict[str, Any]) -> Untrained:
    torch.manual_seed(0)  # for those that start at random
    return Untrained(StudentSpec(site.name, site.short, site.channels, operator, {"heads": site.heads} | options, None))


def gflop(operator: str, options: dict[str, Any]) -> float:
    """Of SD 1.5's block at 2048 px as generation computes it; of a circle, as a kernel that skips what lies outside would."""
    if operator == "clear":
        tokens, d = math.prod(CELLS), SD15.channels
        return (8 * tokens * d * d + 4 * tokens * math.pi * options["radius"] ** 2 * d) / 1e9
    return folded_flops(spec_for(SD15, operator, options, CELLS), CELLS) / 1e9


@torch.no_grad()
def states(examiner: Examiner, size: tuple[int, int]) -> Iterator[tuple[Site, Tensor, Projections, tuple[int, int]]]:
    """What the two sites see of held-out states at a size: tokens, projections, grid."""
    chosen = select(examiner.sites, ",".join(SITES))
    teacher, by_name = Teacher(examiner.pipe.unet, chosen), {site.name: site for site in chosen}
    for latents, timestep, text, _empty in examiner.errors.states(size):
        for name, seen in teacher.activations(latents, timestep, text).items():
            yield by_name[name], seen.input, seen.projections, seen.size


@torch.no_grad()
def errors(found: list, operator: str, options: dict[str, Any], factor: float) -> dict[str, float]:
    """Relative error at each site."""
    sums = {short: torch.zeros(2) for short in SITES}
    for site, x, projections, size in found:
        sharper = sharpened(projections, factor)
        answer = untrained(site, operator, options)(x, sharper, size)
        pair = error_and_spread(answer, exact(x, sharper, site.heads))
        sums[site.short] += torch.stack([part.sum() for part in pair])
    return {short: float(error / spread) for short, (error, spread) in sums.items()}


def main(states_at_256: int = 8, larger: str = "512,1024", only: str = "") -> None:
    """Both tables.

    Args:
        states_at_256: held-out states; a quarter of them at 512 px, one at 1024
        larger: sizes in pixels of the second table, beside 256
        only: of the first table alone, rows whose name contains this; the others stay
    """
    sizes = [256, *(int(side) for side in larger.split(",") if side)]
    config = EvaluationConfig(
        sizes=",".join(map(str, sizes)), guidance="5", states=states_at_256, images=1, device="cpu"
    )
    examiner = Examiner(config)
    found = list(states(examiner, (256, 256)))
    for factor in FACTORS:
        shares = {short: [] for short in SITES}
        for site, x, projections, _ in found:
            shares[site.short].append(float(entropy(x, sharpened(projections, factor), site.heads)))
        print(
            f"x{factor}: entropy",
            {short: round(sum(all_) / len(all_), 3) for short, all_ in shares.items()},
            flush=True,
        )
    rows = []
    kept = {row["untrained"]: row for row in read(RESULTS / "sharpness.csv")} if only else {}
    for name, (operator, options) in METHODS.items():
        if only not in name:
            rows += [kept[name]] if name in kept else []
            continue
        row = {"untrained": name, "gflop_2048": round(gflop(operator, options), 1)}
        for factor in FACTORS:
            row |= {f"{s}_x{factor}": float(f"{e:.2g}") for s, e in errors(found, operator, options, factor).items()}
        print(row, flush=True)
        rows.append(row)
    write("sharpness", rows)
    if only:
        return
    rows = []
    for n, side in zip((states_at_256, max(2, states_at_256 // 4), 1), sizes, strict=False):
        seen = found if side == 256 else _first(states(examiner, (side, side)), n * len(SITES))
        for m in (32, 64, 128, 256, 512):
            of = errors(seen, "clusters", {"landmarks": m}, 1)
            rows.append({"tokens": (side // 8) ** 2, "landmarks": m} | {s: float(f"{e:.2g}") for s, e in of.items()})
            print(rows[-1], flush=True)
    write("landmarks", rows)


def _first(found: Iterator, n: int) -> list:
    return [one for one, _ in zip(found, range(n), strict=False)]


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
