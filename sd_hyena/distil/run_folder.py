"""The folder of one training run: its config, its checkpoints, its exported students.

OUT_DIR/RUN/config.yaml
OUT_DIR/RUN/checkpoints/step-00040.ckpt      everything needed to go on
OUT_DIR/RUN/Hyena-00040.safetensors          the students
OUT_DIR/hyena.safetensors, OUT_DIR/hyena.pt  the students of the newest save of any run
OUT_DIR/NAME.safetensors, OUT_DIR/NAME.pt    of the newest of a run with --name NAME
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.fabric.plugins.io import TorchCheckpointIO
from safetensors import safe_open

from sd_hyena.files.atomic import replacing
from sd_hyena.files.names import free_path
from sd_hyena.options.command import ENDS, Interrupted
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.train_config import NEWEST, TrainConfig
from sd_hyena.processes.memory import is_out_of_memory
from sd_hyena.processes.ranks import say
from sd_hyena.students.checkpoint import versions, write_students


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own save goes through $TMPDIR and destroys the previous file when the disk is full; this does not."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options=None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


class Stopped(Exception):
    """A signal ended the run after a whole step, saved."""


class Checkpoints(L.Callback):
    """Saves every so many steps, at the end, on a signal and on out-of-memory; keeps the newest few; exports students.

    SIGINT and SIGTERM end the run after the step in progress with a checkpoint and `Stopped`; `signal` then tells which
    it was. A second Ctrl-C ends it at once.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        facts: dict[str, Any],
        untrained: dict[str, float] | None = None,
        newest: bool = True,
    ):
        """`newest`: whether the files beside the folder that hold its students too are written."""
        self.folder, self.config, self.facts = folder, config, facts
        self.beside = newest_of(config) if newest else []
        self.untrained = untrained  # the error of each site before the first step; None until it is known
        self.signal: int | None = None
        self.stopping = False  # on every rank, once one of them was signalled
        self.step: int | None = None  # None until training has begun
        self.exported: Path | None = None
        self.validated_step: int | None = None
        self.out_of_memory: Path | None = None  # the checkpoint of the last one

    def note_untrained(self, trainer) -> None:
        """Remember and say where the run starts."""
        metrics, error = trainer.callback_metrics, "val/relative_mse/"
        self.untrained = {k.removeprefix(error): round(float(v), 6) for k, v in metrics.items() if k.startswith(error)}
        say("step 0: relative error " + ", ".join(f"{short} {value:.2g}" for short, value in self.untrained.items()))

    def on_train_start(self, trainer, module) -> None:
        self.step, self.saved_step = trainer.global_step, None
        try:
            for number in ENDS:
                signal.signal(number, self._note_signal)
        except ValueError:  # not the main thread
            pass

    def _note_signal(self, number, _frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise Interrupted
        self.signal = number

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        step, every = trainer.global_step, self.config.save_every_n_steps
        if step == self.step:
            return  # in the middle of an accumulation
        self.step = step
        self.stopping = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if self.stopping or step >= trainer.max_steps or (every and step % every == 0):
            self.save(trainer)

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.stopping and self.step == self.saved_step:  # by now the saved step has been logged
            raise Stopped(self.step)

    def save(self, trainer) -> None:
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / "checkpoints" / f"step-{trainer.global_step:05d}.ckpt")
        if trainer.is_global_zero:
            for old in (*newest_first(self.folder)[self.config.keep :], *exported(self.folder)[self.config.keep :]):
                with suppress(OSError):  # Windows takes away no file that is open: next time
                    old.unlink()

    def on_exception(self, trainer, module, exception) -> None:
        self.out_of_memory = None
        alone = trainer.world_size == 1  # of several ranks one cannot save by itself: it would wait for the others
        if is_out_of_memory(exception) and alone and trainer.state.fn == "fit":
            self.out_of_memory = self.folder / "checkpoints" / "out-of-memory.ckpt"
            trainer.save_checkpoint(self.out_of_memory)

    def on_validation_end(self, trainer, module) -> None:
        self.validated_step = trainer.global_step

    def on_save_checkpoint(self, trainer, module, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run is compared with, and export; with EMA `state_dict` holds the averaged weights."""
        checkpoint["sd_hyena"] = {"config": to_dict(self.config), "untrained": self.untrained, **self.facts}
        self.export(trainer, module, checkpoint["state_dict"])

    def export(self, trainer, module, state: dict[str, torch.Tensor]) -> None:
        """Write the students; rank 0 alone does."""
        if not trainer.is_global_zero:
            return
        metrics = {k: round(float(v), 6) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        steps = {"step": trainer.global_step, "metrics_of_step": self.validated_step}
        training = {**steps, **self.facts, "metrics": metrics, "untrained": self.untrained or {}}
        training |= {"run": self.folder.name, "config": to_dict(self.config)}
        specs = [student.spec for student in module.by_site().values()]
        weights = {site: _below(f"students.{key}.", state) for site, key in module.key.items()}
        name = self.config.name_format.format(s=trainer.global_step)
        self.exported = self.folder / f"{name}.safetensors"
        self.exported.parent.mkdir(parents=True, exist_ok=True)
        training |= {"versions": versions()}
        write_students(self.exported, specs, weights, training)
        for path in self.beside:
            write_newest(path, self.folder.name, lambda path: write_students(path, specs, weights, training))


def newest_of(config: TrainConfig) -> list[Path]:
    """The files in OUT_DIR that hold a run's students too: always hyena, and the name it was given."""
    names = [NEWEST, config.name] if config.name else [NEWEST]
    return [Path(config.out_dir) / f"{name}{suffix}" for name in names for suffix in (".safetensors", ".pt")]


def write_newest(path: Path, run: str, write: Callable[[Path], None]) -> None:
    """Write a file that runs share; what it replaces is said. One that another program holds open stays, on Windows."""
    if path.suffix == ".safetensors" and (said := replaced(path, run)):
        say(said)
    try:
        write(path)
    except PermissionError as error:
        say(f"note: {path} stays as it was ({error.strerror}); the students are in the run's own folder")


def replaced(path: Path, run: str) -> str:
    """What is said of a file of students of another run that a run is about to replace; empty if there is none."""
    try:
        with safe_open(path, "pt") as file:
            training = json.loads(file.metadata()["sd_hyena"])["training"]
        if training.get("run") == run:
            return ""
        config = training.get("config", {})
        sites = config.get("target") or " ".join(training.get("sites", []))
        of = f"{training.get('teacher')}, {sites}, step {training.get('step')}, run {training.get('run', 'unknown')}"
    except Exception:  # there is none, or none of ours
        return f"replacing {path}, which holds no students of ours" if path.exists() else ""
    return f"replacing {path} and .pt, the students of another run ({of}); --name NAME keeps a run's own"


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def newest_first(run: Path) -> list[Path]:
    """The checkpoints of a run's folder."""
    checkpoints = [path for path in (run / "checkpoints").glob("step-*.ckpt") if path.stem[len("step-") :].isdecimal()]
    return sorted(checkpoints, key=lambda path: int(path.stem.removeprefix("step-")), reverse=True)


def exported(run: Path) -> list[Path]:
    """The students of a run's folder, the newest first."""
    return sorted(run.glob("**/*.safetensors"), key=lambda file: file.stat().st_mtime_ns, reverse=True)


def new_run_folder(config: TrainConfig, stamp: str) -> Path:
    """Make OUT_DIR/STAMP-TARGET-OPERATOR, or with a number behind it if two runs start in the same second."""
    name = f"{stamp}-{''.join(c if c.isalnum() else '-' for c in config.target)[:40]}-{config.operator}"
    while True:
        folder = free_path(Path(config.out_dir), name, "")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def holds_something(folder: Path) -> bool:
    """Whether a run has saved anything."""
    return any(folder.glob("checkpoints/*.ckpt")) or any(folder.glob("**/*.safetensors"))


def discard(folder: Path, config: TrainConfig | None) -> None:
    """Take away a run that saved nothing, and, unless they are to tell what failed (None), its curves."""
    for place in (folder, *([Path(config.log_dir) / folder.name] if config else [])):
        shutil.rmtree(place, ignore_errors=True)


def write_config(folder: Path, config: TrainConfig) -> None:
    with replacing(folder / "config.yaml") as temporary:
        temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), "utf-8")
