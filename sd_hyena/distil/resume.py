"""How a run is taken up again: which checkpoint, whether it is of the same experiment, what becomes of later ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sd_hyena.distil.run_folder import exported, newest_first
from sd_hyena.errors import BadInput
from sd_hyena.files.names import free_path
from sd_hyena.files.weights import read_pickle
from sd_hyena.options import given_path
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.ranks import say


@dataclasses.dataclass(frozen=True)
class Resumable:
    """A checkpoint and what is in it."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Resumable:
        """Raises BadInput, and executes nothing, if it is damaged or not ours."""
        try:
            found = cls(path, read_pickle(path, path.stat().st_size))
            found.options["dry_run"], found.options["seed"], found.step
            return found
        except Exception as error:  # pickle's errors have no common base
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise BadInput(
                f"resume={str(path)!r} is damaged or no checkpoint of ours, and was not executed ({reason})"
            ) from None

    @classmethod
    def find(cls, config: TrainConfig) -> Resumable | None:
        """The one that `--resume` means, or None if `auto` finds no run. Raises BadInput."""
        if config.resume != "auto":
            path = Path(config.resume)
            found = newest_first(path) if path.is_dir() else [path]
            if not found or not found[0].is_file() or not (found[0].parent.parent / "config.yaml").is_file():
                raise BadInput(f"resume={config.resume!r} is no checkpoint in a run's folder; {given_path.RUNS}")
            return cls.read(found[0])
        runs = [run for run in Path(config.out_dir).glob("*") if (run / "config.yaml").is_file()]
        for run in sorted(runs, key=lambda run: (run / "config.yaml").stat().st_mtime_ns, reverse=True):
            for path in newest_first(run):
                try:
                    found = cls.read(path)
                except BadInput as error:
                    say(f"passed over: {error}")
                    continue
                if found.options["dry_run"]:
                    break
                return found
        return None

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path.parent.parent

    @property
    def step(self) -> int:
        return self.content["global_step"]

    @property
    def options(self) -> dict[str, Any]:
        """With which the run was started."""
        return self.content["sd_hyena"]["config"]

    @property
    def untrained(self) -> dict[str, float] | None:
        """The error of each site before the first step, if it was noted."""
        return self.content["sd_hyena"].get("untrained")

    @property
    def exported(self) -> Path | None:
        """The run's newest file of students."""
        return next(iter(exported(self.run)), None)

    def check_seed(self, asked: int) -> None:
        """Raises BadInput."""
        own = self.options["seed"]
        if asked not in (-1, own):
            raise BadInput(f"seed={asked} differs from the run's own, {own}; leave --seed away to resume it")

    def check(self, config: TrainConfig, facts: dict[str, Any]) -> None:
        """Refuse to go on as another experiment; say what is merely changed. Raises BadInput."""
        stored, wanted = TrainConfig.translated(self.options), to_dict(config)
        free = {f.name for f in dataclasses.fields(TrainConfig) if f.metadata["free"]}
        changed = {k: (stored.get(k), v) for k, v in wanted.items() if stored.get(k) != v}
        wrong = {k: pair for k, pair in changed.items() if k not in free}
        for name in ("teacher_sha256", "sites"):
            if self.content["sd_hyena"].get(name) != facts[name]:
                wrong[name] = (self.content["sd_hyena"].get(name), facts[name])
        if wrong:
            listing = "; ".join(f"{k}: {old} there, {new} now" for k, (old, new) in wrong.items())
            raise BadInput(
                f"resume={str(self.path)!r} is of another run ({listing}); use its options, or start without --resume"
            )
        for name, (old, new) in changed.items():
            if name != "resume":
                say(f"changed on resume: {name} {old} -> {new}")

    def set_aside_later(self) -> None:
        """Rename the checkpoints of the run that are newer than this one."""
        for later in newest_first(self.run):
            if later == self.path:
                break
            later.rename(free_path(later.parent, later.stem.replace("step", "abandoned"), ".ckpt"))
