"""Trainings that the page starts: processes of their own, which outlive it, and are found again by their records."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

import psutil
import yaml

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.train_config import TrainConfig

TAIL = 1 << 16  # bytes of a log that are read
DONE = {"train": ("next: ", "nothing to do: "), "recipe": ("student of all stages: ",)}  # with what a command ends
SAID_LAST = {"cancelled": ("terminated", "interrupted"), "failed": ("error: ",)}  # likewise
OF_A_RECIPE = ("device", "teacher_model", "vae")  # what the page says of one
_children: dict[int, subprocess.Popen] = {}


@dataclass(frozen=True)
class Training:
    """One, as its record tells: its process, when that began, what it was told, and where its lines go."""

    name: str
    pid: int
    began: str  # of the process, as the system has it: a number that was given again is of another one
    arguments: tuple[str, ...]
    log: str
    log_dir: str
    out_dir: str
    model: str

    @property
    def alive(self) -> bool:
        child = _children.get(self.pid)
        if child is not None and child.poll() is not None:
            return False
        return _began(self.pid) == self.began

    @property
    def lines(self) -> list[str]:
        """The end of what it said."""
        try:
            with open(self.log, "rb") as file:
                file.seek(max(0, os.path.getsize(self.log) - TAIL))
                return file.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []

    @property
    def run(self) -> Path | None:
        """The folder of its run, once it has one; of a recipe the newest."""
        try:
            said = Path(self.log).read_text("utf-8", "replace")
        except OSError:
            return None
        found = re.findall(r"^run (.+)$", said, re.MULTILINE)
        return Path(found[-1]) if found else None

    @property
    def state(self) -> str:
        """running, done, cancelled or failed, by what it said the last."""
        if self.alive:
            return "running"
        said_last = SAID_LAST | {"done": DONE["recipe" if self.arguments[:1] == ("recipe",) else "train"]}
        for line in reversed(self.lines):
            for state, beginnings in said_last.items():
                if line.startswith(beginnings):
                    return state
        return "failed"  # without a word

    @property
    def teacher(self) -> str:
        """The model whose attentions its students stand in for; of a recipe the file may say which."""
        try:
            return str(yaml.safe_load((self.run / "config.yaml").read_text("utf-8"))["teacher_model"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError):
            return self.model

    @property
    def students(self) -> Path | None:
        """The newest file of its students."""
        files = list(self.run.glob("*.safetensors")) if self.run else []
        return max(files, key=lambda file: file.stat().st_mtime_ns, default=None)

    def cancel(self) -> None:
        """End it after the step in progress, with a checkpoint."""
        if self.alive:
            os.kill(self.pid, getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))  # Windows: to its group


class Trainings:
    """All that were started from pages with this folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def all(self) -> dict[str, Training]:
        """By name, the newest first."""
        found = {}
        for path in sorted(self.folder.glob("*.json"), reverse=True):
            try:
                stored = json.loads(path.read_text("utf-8"))
                found[path.stem] = Training(**stored | {"arguments": tuple(stored["arguments"])})
            except (OSError, ValueError, TypeError, LookupError):
                continue
        return found

    def running(self) -> Training | None:
        """The newest that has not ended."""
        return next((one for one in self.all().values() if one.alive), None)

    def start(self, config: TrainConfig) -> Training:
        """Train as a config says. Raises BadInput while another training runs."""
        return self._start(config.name or config.target, config, self._config_file(config))

    def start_recipe(self, recipe: Path, config: TrainConfig) -> Training:
        """The stages of a recipe, with the machine and the teacher of a config, in a folder of its own below the config's,
        for the stages of another recipe are not its own. What the teacher draws is shared."""
        own = replace(
            config,
            out_dir=str(Path(config.out_dir) / f"{recipe.stem}-{_stamp()}"),
            cache_dir=config.cache_dir or str(Path(config.out_dir) / "cache"),
        )
        return self._start(recipe.stem, own, ["recipe", str(recipe), *flags_of(own)])

    def resume(self, name: str | None, n_steps: int = 0) -> Training:
        """Go on with one that has ended, from its newest checkpoint; up to `n_steps` if these are more than it was to have.
        Raises BadInput."""
        training = self.all().get(name or "")
        if training is None or training.alive:
            raise BadInput("resume: choose a training that has ended")
        if training.arguments[0] == "recipe":
            config = TrainConfig(log_dir=training.log_dir, out_dir=training.out_dir, teacher_model=training.model)
            return self._start(Path(training.arguments[1]).stem, config, list(training.arguments))
        if training.run is None or not (training.run / "config.yaml").is_file():
            raise BadInput("resume: this training has no run to go on with; start it anew")
        stored = yaml.safe_load((training.run / "config.yaml").read_text("utf-8"))
        stored = TrainConfig.translated(stored)
        more = {"n_steps": max(n_steps, stored.get("n_steps", 0))} if n_steps else {}
        config = TrainConfig(**stored | more | {"resume": str(training.run)})
        return self._start(f"{config.target}-resumed", config, self._config_file(config))

    def _config_file(self, config: TrainConfig) -> list[str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{_stamp()}.yaml"
        with replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(to_dict(config), sort_keys=False), "utf-8")
        return ["train", "--config", str(path)]

    def _start(self, title: str, config: TrainConfig, arguments: Sequence[str]) -> Training:
        if running := self.running():
            raise BadInput(f"training {running.name} is running; cancel it, or wait until it is done")
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{_stamp()}-{''.join(c if c.isalnum() else '-' for c in title)[:40]}"
        log = self.folder / f"{name}.log"
        with open(log, "wb") as file:
            child = subprocess.Popen(
                [sys.executable, "-m", "sd_hyena", *arguments],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )  # fmt: skip
        _children[child.pid] = child
        places = str(log), str(config.log_dir), str(config.out_dir), config.teacher_model
        training = Training(name, child.pid, _began(child.pid), tuple(arguments), *places)
        with replacing(self.folder / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(asdict(training)), "utf-8")
        return training


def flags_of(config: TrainConfig) -> list[str]:
    """What a recipe is told beside its file."""
    names = (*OF_A_RECIPE, "log_dir", "out_dir", "cache_dir")
    return [f"--{name}={value}" for name in names if (value := getattr(config, name))]


def stages_of(recipe: Path, config: TrainConfig) -> list[TrainConfig]:
    """The stages of a recipe as they would run with the machine and the teacher of a config. Raises BadInput."""
    shared, *stages = read_documents(str(recipe))
    return [parse(TrainConfig, flags_of(config), shared | stage) for stage in stages]


def _stamp() -> str:
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]


def _began(pid: int) -> str:
    """When a process began; empty if there is none, or it has ended and nobody has asked."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return ""
