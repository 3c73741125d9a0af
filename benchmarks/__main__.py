"""python -m benchmarks SUITE: measure speed or memory, write a table, its circumstances and its plots."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SUITES = {
    "core": "the long convolutions alone",
    "block": "attention against every operator and peer, Stable Diffusion 1.5's sites",
    "unet": "a step of Stable Diffusion 1.5's UNet with students at level 0, 0 and 1, everywhere; each site's share",
    "image": "the shipped model end to end: sampling and VAE",
    "memory": "peak memory of a block, each in a process of its own",
    "cpu": "the block on one thread, with the exponent of its time",
    "grow": "ways to draw larger than the shipped model was trained: is it still one picture; resumable",
    "ladder": "the steps of --optimize one after another, with and without students",
}


WITH_STUDENTS = ("unet", "image", "ladder")  # of the default operator, which the result names


def parser() -> argparse.ArgumentParser:
    suites = "".join(f"\n  {name:<8} {says}" for name, says in SUITES.items())
    result = argparse.ArgumentParser(
        prog="python -m benchmarks", description=f"{__doc__}\n{suites}", formatter_class=argparse.RawTextHelpFormatter
    )
    result.add_argument("suite", choices=SUITES, metavar="SUITE", help="one of the above")
    result.add_argument("--device", default="auto", help="auto, cpu, cuda")
    result.add_argument(
        "--dtype", default="auto", help="auto: bfloat16 on a GPU, float32 on a CPU; another is named in the results"
    )
    result.add_argument("--quick", action="store_true", help="small sizes, few rounds: 3 minutes on two cores")
    result.add_argument("--images", type=int, default=12, help="of the suite grow, at 512 px; a third at 1024 px")
    result.add_argument("--upscaler", default="", help="of the suite grow: a file that is measured alone, too")
    result.add_argument("--out", type=Path, default=None, help="folder of the results; default: benchmarks/results")
    return result


def main(given: argparse.Namespace) -> None:
    import torch

    from benchmarks.harness import layouts, record
    from benchmarks.harness.methods import kernels_chosen
    from benchmarks.harness.row import SHOWN
    from benchmarks.harness.setting import Setting, ceilings
    from benchmarks.report import plots
    from sd_hyena.errors import BadInput
    from sd_hyena.processes.device import pick_device

    device = pick_device(given.device)
    suite = importlib.import_module(f"benchmarks.suites.{given.suite}")
    if given.suite == "grow":
        suite.measure(given.images, given.out or record.RESULTS, upscaler=given.upscaler)
        return
    if given.suite == "cpu":
        device = torch.device("cpu")
        torch.set_num_threads(1)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    named = usual if given.dtype == "auto" else given.dtype
    if named not in ("float32", "float16", "bfloat16"):
        raise BadInput(f"dtype={given.dtype!r} is none of auto, float32, float16, bfloat16")
    setting = Setting(device, getattr(torch, named), given.quick)
    best, rows = ceilings(setting), []
    print(f"copy {best.copy / 1e9:.0f} GB/s, matrix product {best.matmul / 1e12:.3g} TFLOP/s", flush=True)
    parts = [*dict.fromkeys((given.suite, device.type)), *([named] if named != usual else [])]
    name = "_".join([*parts, "quick"] if given.quick else parts)
    try:
        for row in suite.rows(setting, best):
            print(f"{row.size[1]}x{row.size[0]} {row.site} {row.method}: {_said(row)}", flush=True)
            rows.append(row.columns())
    finally:  # what was measured before something went wrong is kept
        if rows:
            facts: dict[str, Any] = {"sdpa": kernels_chosen(setting)}
            if given.suite in WITH_STUDENTS:
                facts["students"] = layouts.default_students()
            facts |= {"copy_GB/s": round(best.copy / 1e9, 1), "matmul_TFLOP/s": round(best.matmul / 1e12, 3)}
            folder = given.out or record.RESULTS
            plots.draw(record.write(name, rows, folder, SHOWN, device, **facts))


def _said(row) -> str:
    time = f"{row.compared.seconds.median * 1e3:.4g} ms" if row.compared else ""
    faster = row.compared.verdict if row.compared else ""
    memory = f"{row.allocated:.0f} MiB" if row.allocated is not None else ""
    return ", ".join(filter(None, (row.status, time, faster, memory, row.note)))


def run(arguments: Sequence[str] | None = None) -> int:
    from sd_hyena.options.command import run_parsed

    return run_parsed(lambda: parser().parse_args(arguments), main, list(arguments or sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(run())
