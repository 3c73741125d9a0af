"""A benchmark's table on disk: CSV, and beside it the hardware, versions, commit and command that made it."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread(s)"


def commit() -> str:
    given = {"capture_output": True, "text": True, "cwd": RESULTS.parent}
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **given).stdout.strip()
    dirty = subprocess.run(["git", "status", "--porcelain"], **given).stdout.strip()
    return said + (" with changes" if dirty else "")


def write(name: str, rows: list[dict]) -> Path:
    """Print the rows, write NAME.csv and NAME.json, return the CSV's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    facts = {
        "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip(),
        "commit": commit(),
        "date": date.today().isoformat(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) + 2 for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("".join(str(row[key]).rjust(width) for key, width in widths.items()))
    print(f"{facts['hardware']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}")
    return path
