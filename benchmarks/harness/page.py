"""The page, served by a process of its own, and a browser over it, for what clicks there."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@dataclass(frozen=True)
class Page:
    """Where a page is, its process, its folder, and how long it took until it was there."""

    address: str
    process: subprocess.Popen
    folder: Path
    seconds: float

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text("utf-8", "replace")

    @property
    def resident_mib(self) -> float:
        """Of its process, not of trainings that it started. Linux only."""
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) / 1024


@contextmanager
def served(folder: Path, *flags: str) -> Iterator[Page]:
    """A page on the shipped model whose files all go into `folder`."""
    folder = folder.absolute()
    places = {"out_dir": "outputs", "train_dir": "out", "log_dir": "logs"}
    given = [f"--{name}={folder / place}" for name, place in places.items()]
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    began = time.monotonic()
    with open(folder / "said", "w") as log:
        command = [sys.executable, "-m", "sd_hyena.ui", "--port", "0", "--device", "cpu", *given, *flags]
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r"the page is at (http://\S+)", (folder / "said").read_text())):
            if process.poll() is not None:
                raise RuntimeError((folder / "said").read_text())
            time.sleep(0.05)
        yield Page(found[1], process, folder, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


@contextmanager
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-renderer-backgrounding", "--disable-background-timer-throttling"],
        )
        try:
            yield one
        finally:
            one.close()
