"""python -m benchmarks.studies.quality: every operator and baseline trained alike on the shipped model, judged by the image.

All five level-0 sites at once, same data, steps and seed. A row is trained, evaluated and kept by itself, so the table is
made in pieces and resumed by the same command, which makes what neither the table nor the folder of rows has. Cost:
floating-point operations of one SD 1.5 block at 2048x2048, as generation computes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.methods import UNTRAINED
from benchmarks.harness.record import RESULTS, commit, write
from benchmarks.report.plots import read
from benchmarks.studies.sharpness import gflop
from sd_hyena.distil.training import train
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import Projections, build_student, spec_for
from sd_hyena.students.untrained import Untrained


@dataclass(frozen=True)
class Row:
    """One line of the table; `given` differs from the default run."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    untrained: tuple[str, dict[str, Any]] | None = None  # an operator that needs no training, and its options
    random_projections: bool = False


PUBLISHED = dict(operator="safari", operator_options="emb_dim=3,w=1", schedule="constant", warmup_steps=0, ema=0.0)


def options(text: str) -> dict[str, str]:
    """Of the operator, as --operator_options says them."""
    return {"operator_options": text}


LEARNED = "content=landmarks"  # what Hyena2d's content was before clusters, in the rows of that time
ROWS = [
    Row("Hyena2d, the default"),
    *(Row(name, untrained=of) for name, of in UNTRAINED.items()),
    Row("256 clusters", options("landmarks=256")),
    Row("256 clusters, projections at a tenth of the rate", dict(lr_projections=1e-3, **options("landmarks=256"))),
    Row("256 clusters alone", dict(operator="clusters", **options("landmarks=256,learned=true"))),
    Row(
        "256 clusters alone, projections at a tenth of the rate",
        dict(operator="clusters", lr_projections=1e-3, **options("landmarks=256,learned=true")),
    ),
    *(
        Row(f"Hyena-{form} {says}", dict(operator=f"hyena_{form.lower()}", **options(f"axes={axes}")))
        for axes, says in (("raster", "as Grafting has it"), ("plane", "over the plane"))
        for form in ("SE", "X", "Y")
    ),
    Row("64 clusters", options("landmarks=64")),
    Row("128 learned landmarks", options(LEARNED)),
    Row("landmarks alone", dict(operator="landmarks")),
    *(Row(f"{m} landmarks alone", dict(operator="landmarks", **options(f"landmarks={m}"))) for m in (64, 48)),
    *(Row(f"{m} learned landmarks", options(f"{LEARNED},landmarks={m}")) for m in (256, 192, 64, 32)),
    Row("with a separable filter of rank 4", options(f"{LEARNED},long=separable")),
    Row("with a full filter", options(f"{LEARNED},long=full")),
    Row("linear attention (LinFusion's form)", dict(operator="linear")),
    Row("pointwise MLP", dict(operator="pointwise")),
    Row("content: linear attention, Hedgehog", options("long=separable,content=hedgehog")),
    Row("place alone, separable filter", options("long=separable,content=none")),
    Row("ancestor as published, lr 1e-5", dict(PUBLISHED, data="noise", lr=1e-5)),
    Row("ancestor's operator on real activations", dict(operator="safari")),
    Row("windowed attention, 8x8", dict(operator="windows")),
    Row("bidirectional 1-D", dict(operator="bidirectional")),
    Row("128 learned landmarks, random projections", options(LEARNED), random_projections=True),
    Row("without local", options(f"{LEARNED},local=0")),
    Row("without norm", options(f"{LEARNED},norm=false")),
    Row("with 8x8 windows", options(f"{LEARNED},window=8")),
    Row("1x1 gates", options(f"{LEARNED},gates=dense")),
    Row("content: linear attention, elu + 1", options("long=separable,content=elu")),
    *(Row(f"with a separable filter of rank {r}", options(f"{LEARNED},long=separable,rank={r}")) for r in (1, 2, 8)),
    Row("with filters along the axes", options(f"{LEARNED},long=axial_1d")),
    Row("ancestor as published, lr 1e-6", dict(PUBLISHED, data="noise", lr=1e-6)),
    Row("ancestor on noise, tuned lr", dict(PUBLISHED, data="noise", lr=1e-3)),
]


def run_row(row: Row, config: TrainConfig, folder: Path, examiner: Examiner) -> dict[str, Any]:
    """Train and evaluate one row."""
    config = replace(config, out_dir=str(folder / "out"), log_dir=str(folder / "logs"), **row.given)
    unet, steps = examiner.pipe.unet, config.n_steps
    sites = select(examiner.sites, config.target)
    if row.untrained is not None:
        specs = [spec_for(site, *row.untrained, (32, 32)) for site in sites]
        students, steps = {spec.site: Untrained(spec) for spec in specs}, 0
    else:
        if row.random_projections:
            start = folder / "start.safetensors"
            save_students(start, StudentFile(_with_random_projections(unet, sites, config)))
            config = replace(config, pretrained_weight=str(start))
        path = train(config).exported
        students = load_students(path, unet).students
    ((_, measured, _),) = examiner.examine(students)
    facts = {"name": row.name, "commit": commit(), "date": date.today().isoformat()}
    return facts | {"steps": steps, "seed": config.seed, **measured}


@cache
def operations(name: str) -> float:
    """GFLOP of the row's operator as SD 1.5 would have it at 2048 px."""
    row = next(row for row in ROWS if row.name == name)
    config = TrainConfig(**row.given)
    return round(gflop(*(row.untrained or (config.operator, config.options_of_operator()))), 1)


def _with_random_projections(unet, sites, config: TrainConfig) -> dict[str, Any]:
    """Students whose change replaces the teacher's projections by freshly drawn ones."""
    torch.manual_seed(config.seed)
    students = {}
    for site in sites:
        student = build_student(spec_for(site, config.operator, config.options_of_operator(), (32, 32)))
        own = Projections.of(unet.get_submodule(site.name))
        with torch.no_grad():
            for change, theirs in zip([*student.change, student.change_out], [*own[:3], own.to_out[0]], strict=True):
                change.weight.copy_(torch.nn.Linear(site.channels, site.channels).weight - theirs.weight)
        students[site.name] = student
    return students


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    image = row["images"]["5"]
    return {
        "student": row["name"],
        "seed": row["seed"],
        "steps": row["steps"],
        **{site: float(f"{v['relative_mse']:.2g}") for site, v in row["sites"].items()},
        "prediction": round(row["prediction"]["both"], 5),
        "as_noise": round(row["prediction"]["as_noise"], 5),
        "guided_5": round(row["prediction"]["guided_5"], 5),
        "psnr_median": round(image["psnr_median"], 1),
        "psnr_mean": round(image["psnr_mean"], 1),
        "ssim": round(image["ssim_mean"], 3),
        "above_20_dB": round(image["share_above_20_dB"], 2),
        "gflop_2048": operations(row["name"]),
        "commit": row["commit"],
        "date": row["date"],
    }


def main(
    n_steps: int = 200,
    seeds: int = 1,
    images: int = 16,
    only: str = "",
    out: str = "runs/quality",
    batch_size: int = 8,
    lr: float = 1e-2,
    again: bool = False,
) -> None:
    """Make the rows that are missing, then the table.

    Args:
        n_steps: training steps of a row
        seeds: seeds of each row
        images: images of the judgement
        only: rows whose name contains this
        out: where rows are kept
        batch_size: samples in a step
        lr: learning rate, where the row does not say another
        again: make rows anew that the table has with this seed and so many steps, but not those in the folder
    """
    common = dict(target="level0", width=256, batch_size=batch_size, n_steps=n_steps, ema=0.98, num_samples=64)
    common |= dict(lr=lr, lr_projections=lr)
    common |= dict(validate_every_n_steps=0, save_every_n_steps=0)
    common |= dict(cache_dir=str(Path(out) / "cache"))
    judged = dict(sizes=str(common["width"]), guidance="5", images=images, device="cpu")
    before, stay, examiner = read(RESULTS / "quality.csv"), [], None
    has = {(row["student"], int(row["seed"])) for row in before if int(row["steps"]) in (0, n_steps)}
    series = Path(out) / f"{n_steps}-steps-batch-{batch_size}-lr-{lr:g}-images-{images}"
    for seed in range(seeds):
        for row in ROWS:
            folder = series / f"{''.join(c if c.isalnum() else '-' for c in row.name)}-{seed}"
            done = folder / "row.json"
            if only not in row.name or done.exists():
                continue
            if (row.name, seed) in has and not again:
                stay.append(row.name)
            else:
                folder.mkdir(parents=True, exist_ok=True)
                examiner = examiner or Examiner(EvaluationConfig(**judged))
                measured = run_row(row, TrainConfig(**common, seed=seed), folder, examiner)
                done.write_text(json.dumps(measured, indent=1))
    if stay:
        print(f"{len(stay)} rows are in the table and stay; --again makes them anew: {', '.join(stay)}")
    found = [json.loads(path.read_text()) for path in sorted(series.glob("*/row.json"))]
    table = [_columns(row) for row in found]
    made = {(row["student"], row["seed"]) for row in table}
    known = {row.name for row in ROWS}
    for row in before:
        if (row["student"], int(row["seed"])) not in made:  # counted as all others, whatever was counted at its time
            table.append(row | {"gflop_2048": operations(row["student"])} if row["student"] in known else row)
    table.sort(key=lambda row: float(row["prediction"]))
    write("quality", table, command="python -m benchmarks.studies.quality")
    print(f"{RESULTS / 'quality.csv'}: {len(table)} rows")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
