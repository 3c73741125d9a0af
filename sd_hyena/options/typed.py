"""The command line as it was typed, for people: in the usage of help, and in what others are to repeat."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ABSOLUTE = re.compile(r"(?<![^,+=:])(?:/|~/|[A-Za-z]:[\\/])(?:[^,+=:]*[\\/])?([^,+=:\\/]+)[\\/]?")  # also within lists


def command_name(argv: Sequence[str] | None = None) -> str:
    """How this command was called, with its verb: `sd-hyena train`, `python -m sd_hyena.evaluate`, `python train.py`."""
    argv = sys.argv if argv is None else argv
    called = Path(argv[0])
    parts = called.with_suffix("").parts
    if "sd_hyena" in parts:
        inner = parts[len(parts) - parts[::-1].index("sd_hyena") - 1 :]
        name = "python -m " + ".".join(part for part in inner if part != "__main__")
    else:
        name = f"python {called.name}" if called.suffix == ".py" else called.name
    return f"{name} {argv[1]}" if _has_verb(name, argv) else name


def portable_command(argv: Sequence[str] | None = None) -> str:
    """What can be typed elsewhere: without the folders of this machine, of whose files the names stay."""
    argv = sys.argv if argv is None else argv
    name = command_name(argv)
    given = argv[2:] if name.endswith(f" {''.join(argv[1:2])}") else argv[1:]
    return " ".join([name, *(shlex.quote(_portable(one)) for one in given)])


def _has_verb(name: str, argv: Sequence[str]) -> bool:
    return name in ("sd-hyena", "python -m sd_hyena") and len(argv) > 1 and argv[1].isalpha()


def _portable(given: str) -> str:
    if not given.startswith("-") and Path(given).exists():  # whole, whatever its name holds
        path = Path(given)
        if not path.is_absolute():
            return given
        return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    here = f"{Path.cwd()}/"
    return ABSOLUTE.sub(r"\1", given.replace(here, ""))
