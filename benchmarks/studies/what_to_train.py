"""python -m benchmarks.studies.what_to_train [TARGET ...]: which sites are worth students at which size, for SD 1.5. All of it counted.

How many times fewer operations the UNet takes with the default operator, and what distilling these sites takes at 512 px,
where a student learns what it needs for every size: operations of a step, and memory above the teacher's weights.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch

from benchmarks.harness.layouts import unet_on
from sd_hyena.distil.estimate import SERVES, Estimator
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.memory import peak_gib
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import spec_for

SIZES = (512, 1024, 2048, 4096)  # px that are drawn
TARGETS = ("IN01", "level0", "level0,level1", "all")
MICRO_BATCH = 2


def main(targets: list[str]) -> None:
    cpu, pipe = torch.device("cpu"), SimpleNamespace(unet=unet_on("sd15", "meta", torch.bfloat16))
    everywhere = find_sites(pipe.unet)

    def estimator(target: str, size: int) -> Estimator:
        config = TrainConfig(target=target, width=size, micro_batch_size=MICRO_BATCH)
        sites, cells = select(everywhere, target), (size // 8, size // 8)
        specs = [spec_for(site, config.operator, config.options_of_operator(), cells) for site in sites]
        return Estimator(pipe, config, sites, specs)

    print(
        f"| -t | {' | '.join(f'{size} px' for size in SIZES)} | TFLOP a step of batch 16 | GiB, {MICRO_BATCH} at once |"
    )
    print("|---" * (len(SIZES) + 3) + "|")
    for target in targets or TARGETS:
        cheaper = [estimator(target, size).times_cheaper(select(everywhere, target)) for size in SIZES]
        learning = estimator(target, SERVES)
        step, gib = 16 * learning._lesson() / 1e12, learning._gib(cpu) - peak_gib(cpu)
        print(
            f"| `{target}` | {' | '.join(f'{times:.2f}' for times in cheaper)} | {step:.1f} | {gib:.1f} |", flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
