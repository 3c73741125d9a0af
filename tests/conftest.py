"""Where things are, a way to run the commands, the order of the tests; the fixtures are in fixtures.py."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IN01 = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
OUT11 = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
FORKING = (
    "tests/test_readme.py",
    "tests/distil/test_kept.py",
    "tests/options/test_command.py",
    "tests/faults",
    "tests/processes",
)


def pytest_configure(config):
    """The fixtures import what takes ten seconds: whoever only hands tests to workers goes without."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items):
    """Those that fork their own process come first: of one that has computed much a fork is slow, or torch's threads do not outlive it."""
    first = {path: n for n, path in enumerate(FORKING)}
    items.sort(key=lambda item: next((n for path, n in first.items() if item.nodeid.startswith(path)), len(first)))


def command(*arguments, cwd=ROOT, env=None, timeout=300) -> subprocess.CompletedProcess:
    """Run `python ARGUMENTS` as a user would."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    given = [sys.executable, *map(str, arguments)]
    return subprocess.run(given, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
