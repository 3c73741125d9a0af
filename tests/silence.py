"""python -m tests.silence [SECONDS] [NAME ...]: how long each command of the README is silent, at a pipe and a terminal.

A command is watched for so many seconds, a minute if none are given (more on a machine that others load), or to its end if
that comes first, and must never say nothing for longer than 15 s; what others took of the processor does not count. Exit 1
if one does. What installs or downloads is not here.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LONGEST, WATCHED = 15.0, 60.0  # seconds
COMMANDS = {
    "demo": "-m sd_hyena.demo -o {0}/out -l {0}/logs",
    "train": "train.py -t IN01 -W 2048 -o {0}/out -l {0}/logs",
    "dry_run": "train.py -t IN01 --dry_run -o {0}/out -l {0}/logs",
    "recipe": "-m sd_hyena.recipe configs/recipes/tiny_sd_level0.yaml --out_dir {0}/out --log_dir {0}/logs",
    "evaluate": "-m sd_hyena.evaluate landmarks --images 4 --states 4 --sizes 256 -o {0}/report",
    "generate": "generate.py -o {0}/out",
    "compare": "generate.py -y landmarks --compare -o {0}/out",
}


def waited(pid: int) -> float:
    """Seconds that a process could have gone on and others had the processor, where Linux tells."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def longest_silence(arguments: list[str], terminal: bool, watched: float = WATCHED) -> tuple[float, str]:
    """Seconds, and the last line before it."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    child = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, process_group=0
    )
    os.close(theirs)
    begun = time.monotonic()
    spoken = 0.0
    longest, said = (0.0, ""), b""
    try:
        while time.monotonic() - begun < watched:
            ready, _, _ = select.select([ours], [], [], 0.2)
            chunk = b""
            if ready:
                try:
                    chunk = os.read(ours, 65536)
                except OSError:  # a terminal whose other end is closed
                    break
                if not chunk:
                    break
            now = time.monotonic() - begun - waited(child.pid)
            line = said.decode(errors="replace").replace("\r", "\n").strip().rpartition("\n")[2]
            longest = max(longest, (now - spoken, line))
            if chunk:
                spoken, said = now, said + chunk
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        os.close(ours)
    return longest


def main(given: list[str]) -> int:
    worst, watched = 0.0, next((float(one) for one in given if one.isdecimal()), WATCHED)
    for name in [one for one in given if not one.isdecimal()] or COMMANDS:
        for terminal in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                seconds, line = longest_silence(COMMANDS[name].format(folder).split(), terminal, watched)
            print(f"{name:<10}{'terminal' if terminal else 'pipe':<10}{seconds:6.1f} s  after: {line[:90]}", flush=True)
            worst = max(worst, seconds)
    return int(worst > LONGEST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
