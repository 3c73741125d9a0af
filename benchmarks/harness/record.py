"""A benchmark's table on disk: CSV, and beside it the hardware, versions, commit and command that made it."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent.parent / "results"


def hardware(device: torch.device | None = None) -> str:
    """The GPU, if there is one and no other device was used, else the processor."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def driver() -> dict[str, str]:
    """What a GPU's figures depend on beside PyTorch."""
    said = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    lines = said.stdout.split() or ["unknown"]
    return {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version()), "driver": lines[0]}


def commit() -> str:
    """Of the code that runs; the results themselves are not a change of it."""
    given = {"capture_output": True, "text": True, "cwd": RESULTS.parent}
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **given).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain", "--", ":/", ":(exclude)results"], **given).stdout.strip()
    return said + (" with changes" if dirty else "")


def command() -> str:
    """The command that is running, as a person would type it, but for the folder of its results."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    run = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    given = sys.argv[1:]
    if "--out" in given:
        at = given.index("--out")
        del given[at : at + 2]
    return " ".join(["python", run, *given])


def facts(device: torch.device | None = None) -> dict[str, Any]:
    """The circumstances of a measurement."""
    return {
        "command": command(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **(driver() if device is not None and device.type == "cuda" else {}),
    }


def write(
    name: str,
    rows: list[dict],
    folder: Path = RESULTS,
    shown: Sequence[str] = (),
    device: torch.device | None = None,
    **further: Any,
) -> Path:
    """Print the rows, write NAME.csv and NAME.json into `folder`, return the CSV's path.

    `shown` are the columns to print, all by default; `further` facts go into the JSON beside the usual ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    found = facts(device) | further
    path.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    keys = shown or rows[0].keys()
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) + 2 for key in keys}
    for row in [{key: key for key in keys}, *rows]:
        print("".join(str(row[key]).rjust(width) for key, width in widths.items()))
    print(f"{found['hardware']}, torch {found['torch']}, commit {found['commit']}, {found['date']}")
    return path
