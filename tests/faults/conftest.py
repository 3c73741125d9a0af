"""Faults happen to a child process: its limits, its rights, its signals and its death are its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sd_hyena import doctor
from sd_hyena.distil import __main__ as train
from sd_hyena.doctor import DoctorConfig
from sd_hyena.generate import __main__ as generate
from sd_hyena.options.command import run
from sd_hyena.options.command_line import Config
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig

TRAIN = (
    "-W 64 -n 8 -b 6 --num_samples 4 --sample_steps 2 -d 3 -r 1e-2 -s 2 --validate_every_n_steps 4 --warmup_steps 2"
).split()
GENERATE = ["-W", "64", "-s", "2", "-n", "2", "-k", "11", "-p", "a red circle on blue"]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it; and what it said."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


@dataclass(frozen=True)
class Child:
    """A command that runs beside the test, in `folder`, where it writes to out/ and logs/."""

    pid: int
    folder: Path

    def end(self, number: int | None = None) -> Ended:
        """Send it a signal, if one is given, and wait."""
        if number is not None:
            os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        return Ended(os.waitstatus_to_exitcode(status), *((self.folder / name).read_text() for name in (".1", ".2")))


def start(folder: Path, config_class: type[Config], *arguments, fault: Callable[[], object] = int) -> Child:
    """Run train.py, generate.py or the doctor in a fork of this process, in `folder`; `fault` is what befalls it before."""
    given = ["-o", "out", *(["-l", "logs"] if config_class is TrainConfig else []), *map(str, arguments)]
    sys.stdout.flush(), sys.stderr.flush()
    if pid := os.fork():
        return Child(pid, folder)
    code = 70
    try:
        os.chdir(folder)
        for number, stream in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f".{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
            setattr(sys, stream, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        torch.set_grad_enabled(True)
        fault()
        code = run(config_class, _main(config_class), given)
        sys.stdout.flush(), sys.stderr.flush()
    finally:
        os._exit(code)


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
