"""Faults happen to a child process: its limits, its rights, its signals and its death are its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from sd_hyena import doctor
from sd_hyena.distil import __main__ as train
from sd_hyena.doctor import DoctorConfig
from sd_hyena.generate import __main__ as generate
from sd_hyena.options.command import run
from sd_hyena.options.command_line import Config
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from tests.fork import Child, Ended, fork

TRAIN = (
    "-W 64 -n 8 -b 6 --num_samples 4 --sample_steps 2 -d 3 -r 1e-2 -s 2 --validate_every_n_steps 4 --warmup_steps 2"
).split()
GENERATE = ["-W", "64", "-s", "2", "-n", "2", "-k", "11", "-p", "a red circle on blue"]


def start(folder: Path, config_class: type[Config], *arguments, fault: Callable[[], object] = int) -> Child:
    """Run train.py, generate.py or the doctor in a fork of this process, in `folder`; `fault` is what befalls it before."""
    given = ["-o", "out", *(["-l", "logs"] if config_class is TrainConfig else []), *map(str, arguments)]

    def body() -> int:
        os.chdir(folder)
        fault()
        return run(config_class, _main(config_class), given)

    return fork(body, folder)


def ended(folder: Path, config_class: type[Config], *arguments, fault: Callable[[], object] = int) -> Ended:
    return start(folder, config_class, *arguments, fault=fault).end()


def _main(config_class: type[Config]) -> Callable:
    return {TrainConfig: train.main, GenerateConfig: generate.main, DoctorConfig: doctor.main}[config_class]


def litter(folder: Path) -> list[Path]:
    """Temporary files that nobody took away."""
    return [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name.startswith("tmp")]


def without_root() -> None:
    """What root may do would hide what a user may not."""
    if os.geteuid() == 0:
        os.seteuid(65534)
