"""python -m benchmarks.studies.quality: every operator and baseline trained alike on the shipped model, judged by the image.

All five level-0 sites at once, same data, steps and seed. A row is trained, evaluated and kept by itself, so the
table is made in pieces and resumed by the same command. Cost: floating-point operations of one SD 1.5 block at 2048x2048.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.record import RESULTS, commit, write
from sd_hyena.cost.operations import student_flops
from sd_hyena.distil.training import train
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.generate.alternatives import load_alternatives
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import Projections, StudentSpec, build_student, spec_for

PIXELS, D, HEADS = 2048, 320, 8  # of the block whose cost is counted: SD 1.5's level 0


@dataclass(frozen=True)
class Row:
    """One line of the table; `given` differs from the default run."""

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    untrained: dict[str, Any] | None = None  # options of a mixer that needs no training
    random_projections: bool = False


PUBLISHED = dict(operator="safari", operator_options="emb_dim=3,w=1", schedule="constant", warmup_steps=0, ema=0.0)


def options(text: str) -> dict[str, str]:
    """Of the operator, as --operator_options says them."""
    return {"operator_options": text}


ROWS = [
    Row("Hyena2d, the default"),
    Row("landmarks alone", dict(operator="landmarks")),
    *(Row(f"{m} landmarks alone", dict(operator="landmarks", **options(f"landmarks={m}"))) for m in (64, 48)),
    *(Row(f"{m} landmarks", options(f"landmarks={m}")) for m in (256, 192, 64, 32)),
    Row("with a separable filter of rank 4", options("long=separable")),
    Row("with a full filter", options("long=full")),
    Row("linear attention (LinFusion's form)", dict(operator="linear")),
    Row("pointwise MLP", dict(operator="pointwise")),
    Row("HyperTile, tiles of 128 px, untrained", untrained={"window": 16}),
    Row("content: linear attention, Hedgehog", options("long=separable,content=hedgehog")),
    Row("place alone, separable filter", options("long=separable,content=none")),
    Row("ancestor as published, lr 1e-5", dict(PUBLISHED, data="noise", lr=1e-5)),
    Row("ancestor's operator on real activations", dict(operator="safari")),
    Row("windowed attention, 8x8", dict(operator="windows")),
    Row("bidirectional 1-D", dict(operator="bidirectional")),
    Row("random projections", random_projections=True),
    Row("without local", options("local=0")),
    Row("without norm", options("norm=false")),
    Row("with 8x8 windows", options("window=8")),
    Row("1x1 gates", options("gates=dense")),
    Row("content: linear attention, elu + 1", options("long=separable,content=elu")),
    *(Row(f"with a separable filter of rank {r}", options(f"long=separable,rank={r}")) for r in (1, 2, 8)),
    Row("with filters along the axes", options("long=axial_1d")),
    Row("ancestor as published, lr 1e-6", dict(PUBLISHED, data="noise", lr=1e-6)),
    Row("ancestor on noise, tuned lr", dict(PUBLISHED, data="noise", lr=1e-3)),
]


def run_row(row: Row, config: TrainConfig, folder: Path, examiner: Examiner) -> dict[str, Any]:
    """Train and evaluate one row."""
    config = dataclasses.replace(config, out_dir=str(folder / "out"), log_dir=str(folder / "logs"), **row.given)
    unet = examiner.pipe.unet
    sites = select(examiner.sites, config.target)
    if row.untrained is not None:
        specs = [spec_for(site, "windows", row.untrained, (32, 32)) for site in sites]
        path = folder / "out" / "untrained.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_students(path, StudentFile({spec.site: build_student(spec) for spec in specs}))
    else:
        if row.random_projections:
            start = folder / "start.safetensors"
            save_students(start, StudentFile(_with_random_projections(unet, sites, config)))
            config = dataclasses.replace(config, pretrained_weight=str(start))
        path = train(config).exported
    (alternative,) = load_alternatives(str(path), unet)
    ((_, measured, _),) = examiner.examine(alternative.students)
    return {"name": row.name, "commit": commit(), "steps": config.n_steps, "seed": config.seed, **measured,
            "gflop_2048": round(student_flops(_at_sd15(_spec_of(path)), (PIXELS // 8,) * 2) / 1e9, 1)}  # fmt: skip


def _spec_of(path: Path) -> StudentSpec:
    return next(iter(load_students(path).students.values())).spec


def _at_sd15(spec: StudentSpec) -> StudentSpec:
    """The same operator as SD 1.5 would have it at 2048 px."""
    options = spec.options | ({"heads": HEADS} if "heads" in spec.options else {})
    size = (PIXELS // 8, PIXELS // 8) if spec.size else None
    return StudentSpec("IN01", "IN01", D, spec.operator, options, size)


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


def main(
    n_steps: int = 200,
    seeds: int = 1,
    images: int = 16,
    only: str = "",
    out: str = "runs/quality",
    batch_size: int = 8,
    lr: float = 1e-2,
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
    """
    common = dict(target="level0", width=256, batch_size=batch_size, n_steps=n_steps, ema=0.98, num_samples=64)
    common |= dict(lr=lr, lr_projections=lr)
    common |= dict(validate_every_n_steps=0, save_every_n_steps=0)
    common |= dict(cache_dir=str(Path(out) / "cache"))
    judged = dict(sizes=str(common["width"]), guidance="5", images=images, device="cpu")
    examiner = Examiner(EvaluationConfig(**judged))
    series = Path(out) / f"{n_steps}-steps-batch-{batch_size}-lr-{lr:g}-images-{images}"
    for seed in range(seeds):
        for row in ROWS:
            folder = series / f"{''.join(c if c.isalnum() else '-' for c in row.name)}-{seed}"
            done = folder / "row.json"
            if only in row.name and not done.exists():
                folder.mkdir(parents=True, exist_ok=True)
                measured = run_row(row, TrainConfig(**common, seed=seed), folder, examiner)
                done.write_text(json.dumps(measured, indent=1))
    found = [json.loads(path.read_text()) for path in sorted(series.glob("*/row.json"))]
    table = []
    for row in sorted(found, key=lambda row: row["prediction"]["both"]):
        image = row["images"]["5"]
        table.append(
            {
                "student": row["name"],
                "seed": row["seed"],
                "steps": row["steps"],
                **{site: round(v["relative_mse"], 4) for site, v in row["sites"].items()},
                "prediction": round(row["prediction"]["both"], 5),
                "as_noise": round(row["prediction"]["as_noise"], 5),
                "guided_5": round(row["prediction"]["guided_5"], 5),
                "psnr_median": round(image["psnr_median"], 1),
                "psnr_mean": round(image["psnr_mean"], 1),
                "ssim": round(image["ssim_mean"], 3),
                "above_20_dB": round(image["share_above_20_dB"], 2),
                "gflop_2048": row["gflop_2048"],
            }
        )
    write("quality", table)
    print(f"{RESULTS / 'quality.csv'}: {len(table)} rows")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
