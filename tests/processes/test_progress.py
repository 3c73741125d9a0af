"""Long work is never silent: lines without a terminal, one bar with one, whatever is nested."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest

from sd_hyena.processes import progress
from sd_hyena.processes.progress import Work, work
from tests.conftest import ROOT


def test_without_a_terminal_work_is_announced_and_told_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", 0.05)
    with work("the teacher draws 4 pictures", 4, then="cached in x") as piece:
        piece.to(1)
        with work("tile", 7) as inner:
            inner.to(3)
            time.sleep(0.12)
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "the teacher draws 4 pictures, then cached in x"
    assert lines[0] == "the teacher draws 4 pictures: 1/4, 0:00 left (tile 3/7), then cached in x"
    assert 2 <= len(lines) <= 4 and lines[-1].startswith("the teacher draws 4 pictures: done in")


def test_work_that_fails_ends_its_lines_and_leaves_no_work_open(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", 0.02)
    with pytest.raises(KeyError), work("a"):
        raise KeyError
    before = capsys.readouterr().err
    time.sleep(0.06)
    assert before == "a\n" and capsys.readouterr().err == "" and not progress._open


def test_the_time_left_counts_from_what_was_done_before(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    piece = Work("x", total=12, before=7)
    assert piece.left is None
    now[0] += 30
    piece.to(8)
    assert piece.left == 4 * 30 and piece.line() == "x: 8/12, 2:00 left"


def test_the_time_left_falls_between_two_advances_and_never_rises_before_the_next(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    piece, told = Work("x", total=4), []
    for second in range(1, 81):
        now[0] = second
        if second % 20 == 0:
            piece.to(second / 20)
        told.append(piece.left)
    assert told[:19] == [None] * 19 and told[19:] == [80 - second for second in range(20, 81)]
    late = Work("x", total=4)
    now[0] += 20
    late.to(1)
    now[0] += 500
    assert late.left == 40  # two advances after the one that is late


@pytest.mark.parametrize("lines, columns", [(24, 80), (24, 0), (0, 80), (0, 0)])  # 0: it does not say
def test_on_a_terminal_nested_work_has_one_bar_and_a_long_label_leaves_it_whole(lines, columns):
    script = (
        "import time; from sd_hyena.processes import progress; progress.OFTEN = .05\n"
        "with progress.work('a label ' * 30, 4) as piece:\n"
        "    piece.to(2)\n    with progress.work('tile', 7):\n        time.sleep(.3)\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", lines, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=theirs, stdout=theirs)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # the other end is closed
        pass
    assert child.wait(timeout=60) == 0
    shown = [line for line in said.decode().replace("\r\n", "\r").split("\r") if "|" in line]
    assert shown and any("50%|████████        |" in line and "2/4" in line for line in shown)
    assert "\n" not in said.decode().strip() and all(len(line) <= 80 for line in shown)
