"""python -m tests.silence [SECONDS] [WORD ...]: how long each command of the README is silent, at a pipe and a terminal.

The list is the README's own, with two of MORE; words choose those in which they stand. A command is watched for so many
seconds, a minute if none are given (more on a machine that others load), or to its end if that comes first, and must never
say nothing for longer than 15 s; what others took of the processor does not count. Exit 1 if one does. What installs,
downloads or serves is not here. By hand: no suite runs it.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LONGEST, WATCHED = 15.0, 60.0  # seconds
MORE = ("train.py -t IN01 -W 2048", "train.py -t IN01 --dry_run")
SHIPPED = ROOT / "examples" / "tiny_sd" / "students" / "level0.safetensors"


def commands() -> list[list[str]]:
    """What python is given, in the README's order; a script's own environment is this one."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    typed = [[*_python(line), *line[2:]] if line[0] == "bash" else line[1:] for line in lines if _computes(line)]
    return [*typed, *(line.split() for line in MORE)]


def _computes(line: list[str]) -> bool:
    """Whether a command is of this program, has all it names, and ends."""
    ours = line[:1] == ["python"] or (line[:1] == ["bash"] and bool(_python(line)))
    return ours and "ui.sh" not in line[1] and not any("path/to" in word for word in line)


def _python(line: list[str]) -> list[str]:
    """What a script runs in the end."""
    found = re.search(r'^exec python (.*) "\$@"$', (ROOT / line[1]).read_text("utf-8"), re.MULTILINE)
    return shlex.split(found[1]) if found else []


def _prepared(folder: Path, arguments: list[str]) -> None:
    """A place like the repository, with the students that a command names: what made them is watched by itself."""
    for path in ROOT.iterdir():
        if path.name not in ("out", "logs", "outputs", ".git") and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path)
    for name in arguments:
        if name.startswith("out/") and name.endswith(".pt"):
            from sd_hyena.students.checkpoint import load_students, save_students

            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_students(folder / name, load_students(SHIPPED))


def waited(pid: int) -> float:
    """Seconds that a process could have gone on and others had the processor, where Linux tells."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def longest_silence(
    arguments: list[str], terminal: bool, watched: float, folder: Path
) -> tuple[float, str, int | None]:
    """Seconds, the last line before it, and how the command ended in that time: None if it was still running."""
    ours, theirs = pty.openpty() if terminal else os.pipe()
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=theirs,
        stderr=theirs,
        stdin=subprocess.DEVNULL,
        process_group=0,
    )
    os.close(theirs)
    begun = time.monotonic()
    spoken = 0.0
    longest, said, ended = (0.0, ""), b"", None
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
        with suppress(subprocess.TimeoutExpired):  # its other end is closed before it has ended
            ended = child.wait(5 if time.monotonic() - begun < watched else 0)
        if ended is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        os.close(ours)
    return *longest, ended


def main(given: list[str]) -> int:
    worst, watched = 0.0, next((float(one) for one in given if one.isdecimal()), WATCHED)
    words = [one for one in given if not one.isdecimal()]
    with tempfile.TemporaryDirectory() as place:
        for arguments in commands():
            line = shlex.join(arguments)
            if words and not any(word in line for word in words):
                continue
            for terminal in (False, True):
                _prepared(Path(place), arguments)
                seconds, before, ended = longest_silence(arguments, terminal, watched, Path(place))
                where, end = "terminal" if terminal else "pipe", "running" if ended is None else f"exit {ended}"
                print(f"{seconds:6.1f} s  {where:<9}{end:<8}  {line}  after: {before[:90]}", flush=True)
                worst = max(worst, seconds, LONGEST + 1 if ended else 0)  # what fails was not watched
    return int(worst > LONGEST)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
