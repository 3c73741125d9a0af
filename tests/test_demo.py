"""The demo's trainings are parts of it: they leave no newest students, and name no command that the demo lacks."""

import dataclasses
import shutil

import pytest

from sd_hyena import demo
from sd_hyena.demo import DemoConfig
from sd_hyena.distil import training
from sd_hyena.options.command import Terminated
from tests.distil.test_training import interrupt_after


def test_a_demo_that_is_stopped_says_what_becomes_of_it(tmp_path, drawn, monkeypatch, capsys):
    places = dict(out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"))
    shutil.copytree(drawn, tmp_path / "out" / "cache")
    small = DemoConfig(width=64, n_steps=4, batch_size=2, num_samples=4, sample_steps=2, **places)
    original = training.train
    shorter = lambda config, within: original(dataclasses.replace(config, save_every_n_steps=2), within)
    monkeypatch.setattr(training, "train", shorter)
    interrupt_after(monkeypatch, 1)
    with pytest.raises(Terminated):
        demo.main(small)
    said = capsys.readouterr().out
    assert "saved at step 1; the demo, run again, begins its students anew" in said and "--resume" not in said
    assert not list((tmp_path / "out").glob("*.pt"))
