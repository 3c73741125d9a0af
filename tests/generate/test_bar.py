"""A drawing is never silent, and what is noted beside its bar is a line of the output."""

import time
from contextlib import closing

from sd_hyena.generate.bar import Bar
from sd_hyena.processes import progress


def test_at_a_pipe_a_drawing_that_takes_long_says_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SELDOM", 0.05)
    with closing(Bar()) as bar:
        bar.begin(20)
        time.sleep(0.12)
        bar.step(1.5, 20, None)
        with progress.work("tile", 7) as inner:
            inner.to(3)
            time.sleep(0.12)
        bar.note("a note")
        bar.step(2, 20, None)
        time.sleep(0.06)
    said = capsys.readouterr()
    assert said.out == "a note\n" and not progress._open
    begun, *_ = lines = said.err.splitlines()
    *_, last, done = lines
    first = next(line for line in lines if "1.5" in line)
    assert (
        begun.startswith("drawing: 0/20, ")
        and first.startswith("drawing: 1.5/20, ")
        and first.endswith("left (tile 3/7)")
    )
    assert last.startswith("drawing: 2/20, ") and done.startswith("drawing: done in")


def test_a_drawing_that_is_quick_says_nothing(capsys):
    with closing(Bar()) as bar:
        bar.step(1, 1, None)
    bar.close()
    assert capsys.readouterr() == ("", "")
