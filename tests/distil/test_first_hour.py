"""What a run says before and while it works, and what survives when it is stopped."""

import itertools
import os
import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_hyena.distil import counted as counted_operations
from sd_hyena.distil import estimate, previews
from sd_hyena.distil import foretold as foretelling
from sd_hyena.distil import module as distillation
from sd_hyena.distil.__main__ import command
from sd_hyena.distil.curves import layout
from sd_hyena.distil.estimate import Estimator
from sd_hyena.distil.foretold import foretold
from sd_hyena.distil.run_folder import Checkpoints
from sd_hyena.distil.run_options import options_of_run
from sd_hyena.distil.training import train
from sd_hyena.errors import BadInput
from sd_hyena.options.command import Terminated
from sd_hyena.options.command_line import parse
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import Work
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import load_students
from tests.distil.test_training import assert_equal_weights, config, interrupt_after, weights
from tests.gate import gated


class Reached(Exception):
    pass


def stop(*_):
    raise Reached


@pytest.fixture(scope="module")
def cached(tmp_path_factory, drawn):
    """A finished run of four steps, whose pictures the others take."""
    folder = tmp_path_factory.mktemp("first")
    shutil.copytree(drawn, folder / "out" / "cache")
    return folder, train(config(folder, n_steps=4))


@pytest.fixture
def folder(cached, tmp_path):
    shutil.copytree(cached[0] / "out" / "cache", tmp_path / "out" / "cache")
    return tmp_path


def test_resume_with_a_run_alone_takes_its_options_and_ends_bit_equal(cached, folder, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        interrupt_after(patch, 2, signal.SIGTERM)
        train(config(folder, n_steps=4))
    typed = re.search(r"go on with (--resume \S+)", capsys.readouterr().out)[1].split()
    validated, note = [], Checkpoints.on_validation_end
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_validation_end", lambda *given: (validated.append(given), note(*given)))
        assert command(typed) == 0
    said = capsys.readouterr().out
    assert "min for 2 steps of batch 6" in said  # those to go
    assert len(validated) == 1 and ", 1 validation " in said  # none before the first step
    assert_equal_weights(weights(cached[0]), weights(folder))
    assert command(["--resume", "auto", "-o", str(folder / "out")]) == 0  # finished, by the options of its run
    assert "nothing to do" in capsys.readouterr().out
    assert command([*typed, "-W", "72"]) == 2 and "width: 64 there, 72 now" in capsys.readouterr().err


def test_resume_auto_takes_the_options_of_the_run_that_it_means_where_none_are_given(tmp_path):
    def run(name, **options):
        (tmp_path / "out" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "out" / name / "config.yaml").write_text(yaml.safe_dump(options))
        if name != "bare":
            (tmp_path / "out" / name / "checkpoints" / "step-00001.ckpt").touch()
        os.utime(tmp_path / "out" / name / "config.yaml", ns=(len(made), len(made)))
        made.append(name)

    made = []
    run("older", width=64, lr=1e-4)
    run("newer", width=72, seed=5, resume="auto")
    run("dry", width=80, dry_run=True)
    run("bare", width=88)
    out = str(tmp_path / "out")
    for given in (["-o", out], ["--out-dir", out], [f"--out_dir={out}"]):
        assert options_of_run([*given, "--resume", "auto"]) == {"width": 72, "seed": 5}
    (tmp_path / "c.yaml").write_text(f"out_dir: {out}\n")
    assert options_of_run(["--config", str(tmp_path / "c.yaml"), "--resume=auto"]) == {"width": 72, "seed": 5}
    assert options_of_run(["-o", out]) == options_of_run(["-o", str(tmp_path), "--resume", "auto"]) == {}
    assert parse(TrainConfig, ["-o", out, "-W", "96"], options_of_run(["-o", out, "--resume", "auto"])).seed == 5


@pytest.mark.parametrize("ema", [*gated([0.0]), 0.9])
def test_out_of_memory_in_a_validation_halves_the_batch_and_goes_on(folder, monkeypatch, capsys, ema):
    original, sizes = distillation.cosine, []

    def out_of_memory(ours, truth):
        sizes.append(len(ours))
        if len(ours) > 3 and len(sizes) > 1:  # the validation before training had enough
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(ours, truth)

    monkeypatch.setattr(distillation, "cosine", out_of_memory)
    outcome = train(config(folder, n_steps=6, ema=ema, operator="pointwise"))
    assert "2 micro-batches of 3" in capsys.readouterr().out
    assert load_students(outcome.exported).training["step"] == 6 and outcome.metrics["val/relative_mse/IN01"] > 0


@pytest.mark.parametrize("teacher", ["guessed", *gated(["counted"])])
def test_before_anything_is_drawn_the_run_is_estimated_and_better_choices_are_named(
    tmp_path, monkeypatch, capsys, counted, teacher
):
    """The teacher's operations are counted in cost/test_operations.py too, which takes seconds."""
    from sd_hyena.distil import training

    if teacher == "guessed":
        guess = lambda _unet, size, _last="": 10**7 * size[0] * size[1] + 1000 * (size[0] * size[1]) ** 2
        monkeypatch.setattr(counted_operations, "unet_flops", guess)
    monkeypatch.setattr(training, "make_bank", stop)
    with pytest.raises(Reached):
        train(config(tmp_path, width=2048, n_steps=200, num_samples=32))
    said = capsys.readouterr().out
    for phase in ("drawing 32 pictures", "encoding", "200 steps of batch 6", "51 validations", "peak memory about"):
        assert phase in said, phase
    assert "previews 0" not in said and "previews 1" not in said  # too large for a CPU
    assert "training at -W 512 costs 16 times less" in said and "configs/recipes/tiny_sd_level0.yaml" in said
    assert "-y landmarks needs no training" in said


def test_a_name_is_kept_beside_the_newest_and_what_is_replaced_is_named(folder, capsys):
    few = dict(n_steps=1, validate_every_n_steps=0)
    train(config(folder, **few, name="mine"))
    assert "replacing" not in capsys.readouterr().out
    first = weights(folder)
    other = train(config(folder, **few, lr=1e-3, seed=4))
    said = capsys.readouterr().out
    assert re.search(
        r"replacing \S+hyena\.safetensors and \.pt, the students of another run \(model, IN01, step 1", said
    )
    assert said.count("replacing") == 1
    assert_equal_weights(
        first,
        load_students(folder / "out" / "mine.pt").students[next(iter(load_students(other.exported)))].state_dict(),
    )
    for name in ("a/b", "..", ".x", "{s}", "con"):
        with pytest.raises(BadInput, match="name="):
            config(folder, name=name)


def test_a_run_that_ends_above_its_start_says_so(folder, capsys):
    outcome = train(config(folder, n_steps=2, operator="pointwise", lr=50.0, warmup_steps=0, clip=0.0))
    said, training = capsys.readouterr().out, load_students(outcome.exported).training
    assert re.search(r"step 0: relative error IN01 \d[.\de-]*", said)
    assert training["untrained"]["IN01"] < training["metrics"]["val/relative_mse/IN01"]
    assert "IN01 is worse than untrained" in said


def test_tensorboard_has_options_log_errors_and_one_chart_a_level(folder, unet, previews_drawn, monkeypatch):
    monkeypatch.setattr(previews, "PICTURES", 4)  # as it is but for tests
    (folder / "mine.txt").write_text("a red circle\na blue square\n")
    outcome = train(config(folder, n_steps=1, operator="pointwise", sample_prompts=str(folder / "mine.txt")))
    reader = EventAccumulator(str(folder / "logs" / outcome.folder.name)).Reload()
    tags = reader.Tags()
    assert "config/text_summary" in tags["tensors"] and "custom_scalars__config__" in tags["tensors"]
    log10, plain = (reader.Scalars(f"val/{name}/IN01")[0].value for name in ("log10_relative_mse", "relative_mse"))
    assert 10**log10 == pytest.approx(plain, rel=1e-4)
    assert "_hparams_/session_start_info" in reader.summary_metadata
    level0 = [site for site in find_sites(unet) if site.level == 0]
    assert len(layout(level0)["log10 of the relative error"]["level 0"][1]) == 5
    (shown,) = (reader.Images(tag)[0] for tag in tags["images"] if tag.startswith("image"))
    assert (shown.height, shown.width) == (4 * 64, 3 * 64)  # two prompts, four seeds


def test_above_512_px_a_cpu_says_in_a_line_that_there_are_no_previews(folder, monkeypatch, capsys):
    from sd_hyena.distil import training

    monkeypatch.setattr(training, "draws_previews", lambda *_: False)
    monkeypatch.setattr(training, "_fit", stop)
    with pytest.raises(Reached):
        train(config(folder, n_steps=1, operator="pointwise"))
    assert "note: no previews and no image PSNR at 64x64 on a CPU, only up to 512x512" in capsys.readouterr().out
    assert not list((folder / "out").glob("*/config.yaml"))  # it saved nothing


def test_the_time_of_all_stages_is_the_sum_of_theirs_and_pictures_are_drawn_once(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(Work, "seconds_said", staticmethod(lambda seconds: f"{seconds!r}s"))
    first, second = config(tmp_path, n_steps=5), config(tmp_path, n_steps=7, stage="joint", lr=1e-3)
    third = config(tmp_path, n_steps=2, width=72, height=64)
    line = next(line for line in foretold(pipe, first, 4, (second, third)) if line.startswith("all 3 stages"))
    total, *each = map(float, re.findall(r" ([\d.]+(?:e-\d+)?)s\b", line))
    assert total == pytest.approx(sum(each)) and "layerwise 64x64" in line and "joint 64x64" in line
    device, estimator = torch.device("cpu"), foretelling._estimator
    alone = [
        estimator(pipe, one).estimate(n, device, steps)
        for one, n, steps in ((first, 4, 4), (second, 0, 7), (third, 4, 2))
    ]
    assert each == pytest.approx([one.total for one in alone])


def test_the_validations_of_a_run_are_those_at_its_steps_and_a_resumed_one_makes_none_at_step_0():
    for n_steps, every, start in itertools.product((1, 4, 5, 7, 12), (0, 1, 4, 5), range(7)):
        if start >= n_steps:
            continue
        made = {step for step in range(start + 1, n_steps + 1) if every and step % every == 0} | {n_steps}
        made |= {0} if start == 0 else set()
        asked = SimpleNamespace(config=SimpleNamespace(n_steps=n_steps, validate_every_n_steps=every))
        assert Estimator._validations(asked, n_steps - start) == len(made), (n_steps, every, start)


def test_previews_are_counted_in_a_dry_run_too_and_as_many_as_there_are_prompts(pipe, tmp_path):
    (tmp_path / "six.txt").write_text("a\nb\nc\nd\ne\nf\n")
    seconds = lambda **given: (
        foretelling._estimator(pipe, config(tmp_path, **given)).estimate(0, torch.device("cpu"), 8).seconds["previews"]
    )
    one = seconds()  # the tests' own: one picture
    assert one > 0 and seconds(dry_run=True) == one
    assert seconds(sample_prompts=str(tmp_path / "six.txt")) == pytest.approx(6 * one)


def test_a_run_that_is_refused_leaves_no_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    with pytest.raises(BadInput, match="holds no picture"):
        train(config(tmp_path, data="images", data_path=str(tmp_path / "texts")))
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


@pytest.mark.parametrize(
    "size, native, quick, probed",
    [
        ((64, 64), 64, 1e9, [16, 32, 64]),
        ((128, 128), 32, 1e9, [16, 32]),
        ((64, 64), 64, 5.0, [16, 32]),
        ((64, 64), 64, 0, [16]),
    ],
    ids=["up to the size", "up to the model's own", "while it is quick", "not at all"],
)
def test_a_model_is_timed_as_near_to_the_size_as_is_quick(counted, monkeypatch, size, native, quick, probed):
    seen = []
    estimator = object.__new__(Estimator)
    estimator.size, estimator.native = size, (native, native)
    estimator._unet = lambda size, last="": size[0] * size[1]
    estimator._timed = lambda size, _device: seen.append(size[0]) or float(300 * len(seen))
    monkeypatch.setattr(estimate, "PROBE", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(estimate, "QUICK", quick)
    assert estimator._rate(torch.device("cpu")) == 300 * len(probed) and seen == probed
