"""The options of a run that is taken up again, read without torch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.shipped import shipped_file
from sd_hyena.options.train_config import TrainConfig


def options_of_run(arguments: list[str]) -> dict[str, Any]:
    """The options of the run that `--resume` means in a command line, for what the line itself leaves open.

    Of `auto` that is the newest run of OUT_DIR that has a checkpoint, dry ones passed over.
    """
    named = _value(arguments, "--resume")
    if not named:
        return {}
    if named == "auto":
        return next(filter(None, map(_options, _newest_first(Path(_out_dir(arguments))))), {})
    path = Path(named)
    run = path if path.is_dir() else path.parent.parent
    return _options(run) if (run / "config.yaml").is_file() else {}  # else it will be refused


def _out_dir(arguments: list[str]) -> str:
    config = _value(arguments, "--config")
    stored = read_documents(shipped_file(config))[0].get("out_dir") if config else None
    return _value(arguments, "--out_dir", "-o") or str(stored or TrainConfig.out_dir)


def _newest_first(folder: Path) -> list[Path]:
    runs = [path.parent.parent for path in folder.glob("*/checkpoints/step-*.ckpt")]
    configs = {run / "config.yaml" for run in runs if (run / "config.yaml").is_file()}
    return [path.parent for path in sorted(configs, key=lambda path: path.stat().st_mtime_ns, reverse=True)]


def _options(run: Path) -> dict[str, Any]:
    """Of a run that can be taken up; empty for a dry or damaged one."""
    try:
        (options,) = read_documents(str(run / "config.yaml"))
    except (BadInput, ValueError):
        return {}
    return {} if options.get("dry_run") else {k: v for k, v in options.items() if k not in ("resume", "dry_run")}


def _value(arguments: list[str], *flags: str) -> str:
    """The last value of a flag; dashes in its name mean underscores."""
    spelled = lambda flag: f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag
    values = [value for flag, value in pairwise(arguments) if spelled(flag) in flags]
    parts = [argument.partition("=") for argument in arguments]
    values += [value for flag, equals, value in parts if equals and spelled(flag) in flags]
    return values[-1] if values else ""
