"""`-t auto`: the choice is made by a pilot that a stop does not cost, and that leaves nothing of its own in OUT_DIR."""

import math

import pytest

from sd_hyena.distil import pilot
from sd_hyena.distil.candidates import Candidate
from sd_hyena.distil.training import train
from sd_hyena.options.command import Terminated
from sd_hyena.students.checkpoint import load_students
from tests.distil.test_training import config, interrupt_after


@pytest.fixture
def quick(monkeypatch, shared_pipe):
    """Two sites that a student makes cheaper, counted before."""
    found = [(Candidate(short, 10**9, 10**8, math.inf), None) for short in ("IN01", "OUT11")]
    monkeypatch.setattr(pilot, "counted", lambda *_: (10**10, found))
    monkeypatch.setattr(pilot, "speedup", lambda *_, **__: 2.0)
    monkeypatch.setattr(pilot, "build_student", lambda _: pilot.torch.nn.Identity())
    monkeypatch.setattr(pilot, "load_pipeline", lambda *_: shared_pipe)
    monkeypatch.setattr(pilot, "STEPS", 2)


@pytest.mark.gate  # three runs
def test_a_stopped_pilot_is_gone_on_with_by_the_same_command_and_a_finished_one_is_not_run_again(
    folder, monkeypatch, capsys, quick
):
    given = config(folder, target="auto", budget="1.05x", n_steps=1, operator="pointwise", name="mine")
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        interrupt_after(patch, 1)
        train(given)
    said, out = capsys.readouterr().out, folder / "out"
    assert "saved at step 1; no sites are chosen yet; the same command goes on with the pilot" in said
    assert "--resume" not in said and not list(out.glob("*.pt"))
    first = train(given)
    said = capsys.readouterr().out
    assert "min for 1 steps" in said and "replacing" not in said and said.count("next: ") == 1
    assert sorted(path.name for path in out.glob("*.pt")) == ["hyena.pt", "mine.pt"]
    (tried,) = out.glob("pilot-*")
    assert not list(tried.glob("*.pt"))
    assert len(load_students(first.exported).students) == 1
    train(given)
    assert "nothing to do" in capsys.readouterr().out and len(list(out.glob("pilot-*"))) == 1
