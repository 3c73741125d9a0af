"""The options of a run that is taken up again, read without torch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from sd_hyena.files.yaml_file import read_documents


def options_of_run(arguments: list[str]) -> dict[str, Any]:
    """The options of the run that `--resume RUN` names in a command line, for what the line itself leaves open."""
    named = [value for flag, value in pairwise(arguments) if flag == "--resume"]
    named += [argument.partition("=")[2] for argument in arguments if argument.startswith("--resume=")]
    if not named:
        return {}
    path = Path(named[-1])
    run = path if path.is_dir() else path.parent.parent
    if not (run / "config.yaml").is_file():
        return {}  # auto, or what will be refused
    (options,) = read_documents(run / "config.yaml")
    return {name: value for name, value in options.items() if name not in ("resume", "dry_run")}
