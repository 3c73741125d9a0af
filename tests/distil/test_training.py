"""Whole runs of `train`, small: 64 px, a few steps. A resumed run is the uninterrupted one, bit for bit."""

import contextlib
import dataclasses
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

from sd_hyena.distil import pilot, stages
from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.module import PATIENCE, Distillation, NonFinite
from sd_hyena.distil.resume import Resumable
from sd_hyena.distil.sources import make_bank
from sd_hyena.distil.stages import Joint, prediction_error
from sd_hyena.distil.training import train
from sd_hyena.errors import BadInput
from sd_hyena.models.example_prompts import prompts_of
from sd_hyena.models.location import model_sha256
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.command import Interrupted, Terminated
from sd_hyena.options.command_line import to_dict
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.teacher import Teacher
from tests.conftest import IN01
from tests.gate import gated

SMALL = dict(width=64, n_steps=8, batch_size=6, num_samples=4, sample_steps=2, seed=3, lr=1e-2)
SMALL |= dict(save_every_n_steps=0, validate_every_n_steps=4, warmup_steps=2)


def config(folder, **options) -> TrainConfig:
    """A small run; with fewer landmarks than tokens, else a new student is attention itself and has nothing to learn."""
    few = {} if "operator" in options and options["operator"] != "hyena2d" else {"operator_options": "landmarks=4"}
    return TrainConfig(**{**SMALL, **few, "out_dir": str(folder / "out"), "log_dir": str(folder / "logs"), **options})


def weights(folder) -> dict[str, torch.Tensor]:
    return load_students(folder / "out" / "hyena.safetensors").students[IN01].state_dict()


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def curve(folder, tag) -> list[tuple[int, float]]:
    (run,) = [path for path in (folder / "logs").iterdir() if path.is_dir()]
    reader = EventAccumulator(str(run)).Reload()  # as TensorBoard reads it: all files, what was purged left out
    points = [(point.step, point.value) for point in reader.Scalars(tag)]
    return sorted(points, key=lambda point: point[0])  # a process's tenth file of one second is read before its ninth


@pytest.fixture(scope="module")
def _finished(drawn, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(drawn, folder / "out" / "cache")
    train(config(folder, n_steps=2))
    return folder


@pytest.fixture
def finished(_finished, tmp_path):
    """A copy of a folder in which a run of two steps has ended."""
    return shutil.copytree(_finished, tmp_path / "finished")


def interrupt_after(monkeypatch, step, number=signal.SIGTERM):
    """Send ourselves a signal in the middle of a training step."""
    original = Distillation.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step - 1 and not getattr(self, "sent", False):
            self.sent = True
            os.kill(os.getpid(), number)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", training_step)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"micro_batch_size": 2, "operator": "bidirectional"}, marks=pytest.mark.slow),
        pytest.param({"ema": 0.8}, marks=pytest.mark.slow),
        {"ema": 0.8, "micro_batch_size": 2, "schedule": "constant"},
        *gated([{"stage": "end_to_end"}]),
    ],
    ids=["plain", "accumulated", "averaged", "accumulated-averaged", "end to end"],
)
def test_a_run_interrupted_and_resumed_at_three_points_is_bit_equal_to_the_uninterrupted_one(
    folder, tmp_path_factory, monkeypatch, previews_drawn, options
):
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder / "out" / "cache", whole / "out" / "cache")
    train(config(whole, **options))
    for step in (1, 4, 7):
        with monkeypatch.context() as patch:
            interrupt_after(patch, step)
            with pytest.raises(Terminated):
                train(config(folder, **options, resume="auto" if step > 1 else ""))
    train(config(folder, **options, resume="auto"))
    assert_equal_weights(weights(whole), weights(folder))
    tags = ["train/loss/IN01", "train/lr", "val/relative_mse/IN01"]
    for tag in [*tags, *(["train/loss/guidance", "val/prediction"] if "stage" in options else [])]:
        assert curve(folder, tag) == curve(whole, tag) != []


def test_ctrl_c_ends_after_the_step_with_a_checkpoint(folder, monkeypatch):
    interrupt_after(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(Interrupted):
        train(config(folder))
    (saved,) = (folder / "out").glob("*/checkpoints/*.ckpt")
    assert saved.name == "step-00003.ckpt"


def test_micro_batches_give_the_gradient_of_the_whole_batch(folder, tmp_path_factory, monkeypatch):
    """With a loss that is a mean over samples; the relative error is a ratio, so it is replaced here."""
    monkeypatch.setattr(stages, "relative_mse", lambda answer, target: (answer - target).square().mean())
    gradients = []
    monkeypatch.setattr(
        Distillation,
        "on_before_optimizer_step",
        lambda self, _: gradients.append({n: p.grad.clone() for n, p in self.named_parameters()}),
    )
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(folder / "out" / "cache", other / "out" / "cache")
    for given in ({"out_dir": str(folder / "out")}, {"out_dir": str(other / "out"), "micro_batch_size": 2}):
        # Hedgehog: an inverse between landmarks multiplies the rounding that is left.
        train(config(folder, n_steps=1, validate_every_n_steps=0, operator_options="content=hedgehog", **given))
    whole, accumulated = gradients
    for name in whole:
        scale = whole[name].abs().max()
        torch.testing.assert_close(accumulated[name], whole[name], rtol=0, atol=float(1e-5 * scale), msg=name)


def test_with_accumulation_the_logged_loss_is_that_of_the_whole_step(folder, monkeypatch):
    seen = []
    original = Distillation.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        seen.append(loss.item())
        return loss

    monkeypatch.setattr(Distillation, "training_step", training_step)
    train(config(folder, n_steps=2, micro_batch_size=3))
    expected = [(1, sum(seen[:2]) / 2), (2, sum(seen[2:]) / 2)]
    assert [(s, pytest.approx(v, rel=1e-5)) for s, v in curve(folder, "train/loss/IN01")] == expected


def test_out_of_memory_halves_the_micro_batch_and_goes_on_from_the_step_it_hit(folder, monkeypatch, capsys):
    original, sizes = Distillation.training_step, []

    def training_step(self, batch, batch_idx):
        size = len(batch[IN01].input)
        sizes.append((self.trainer.global_step, size))
        if size > 3 and self.trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", training_step)
    outcome = train(config(folder, n_steps=4))
    assert sizes == [(0, 6), (1, 6), (2, 6), (2, 3), (2, 3), (3, 3), (3, 3)]
    assert "2 micro-batches of 3" in capsys.readouterr().out
    assert load_students(outcome.exported).training["step"] == 4


def test_a_batch_that_does_not_fit_the_teacher_is_halved_before_the_run(folder, monkeypatch):
    original, sizes = Teacher.activations, []

    def activations(self, latents, *rest):
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return original(self, latents, *rest)

    monkeypatch.setattr(Teacher, "activations", activations)
    train(config(folder, n_steps=1))
    assert sizes[:3] == [6, 3, 1] and set(sizes[2:]) == {1}


def test_a_half_precision_teacher_teaches_a_float32_student(folder):
    save_file({"latents": torch.randn(2, 4, 8, 8)}, folder / "latents.safetensors")
    given = dict(n_steps=1, batch_size=2, data="latents", data_path=str(folder / "latents.safetensors"))
    outcome = train(config(folder, dtype="bfloat16", **given))
    assert outcome.metrics["val/relative_mse/IN01"] > 0
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}


def test_a_float16_teacher_needs_a_scaled_loss(folder):
    """Gradients of a relative error are about 1 / N; through float16 they would vanish."""
    with pytest.raises(BadInput, match="gradients would vanish"):
        train(config(folder, dtype="float16", n_steps=1))


@pytest.mark.parametrize("ema", [*gated([0.0]), 0.9])
def test_the_stored_prediction_error_is_of_the_exported_weights(folder, ema):
    given = config(folder, stage="joint", n_steps=2, batch_size=2, ema=ema)
    outcome = train(given)
    pipe = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)
    file = load_students(outcome.exported, pipe.unet)
    (name,) = file.students
    teacher = Teacher(pipe.unet, [site for site in find_sites(pipe.unet) if site.name == name])
    bank = make_bank(pipe, given, prompts_of(SHIPPED_MODEL), model_sha256(SHIPPED_MODEL), folder / "out" / "cache")
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    states = default_collate(Lessons(Joint(teacher), scheduler, bank, given).held_out())
    error, spread = prediction_error(teacher, file.students, states)
    assert file.training["metrics"]["val/prediction"] == pytest.approx(float(error / spread), rel=1e-3)


def test_a_signal_in_the_last_step_does_not_let_what_follows_run(folder, monkeypatch):
    interrupt_after(monkeypatch, 2)
    with pytest.raises(Terminated):
        train(config(folder, n_steps=2))
    assert (folder / "out" / "hyena.pt").exists()


@pytest.mark.gate
def test_a_longer_run_with_averaging_is_the_run_that_was_longer_from_the_start(folder, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole")
    shutil.copytree(folder / "out" / "cache", whole / "out" / "cache")
    options = dict(ema=0.8, schedule="constant")
    train(config(whole, n_steps=6, **options))
    train(config(folder, n_steps=3, **options))
    train(config(folder, n_steps=6, **options, resume="auto"))
    assert_equal_weights(weights(whole), weights(folder))


def test_out_of_memory_with_single_samples_is_an_error(folder, monkeypatch):
    def training_step(self, batch, batch_idx):
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    monkeypatch.setattr(Distillation, "training_step", training_step)
    with pytest.raises(torch.OutOfMemoryError):
        train(config(folder, batch_size=2))


@pytest.mark.parametrize("where", [*gated(["loss"]), "gradient"])
def test_a_non_finite_loss_or_gradient_never_reaches_the_weights(folder, monkeypatch, where):
    original, seen = Distillation.training_step, {}

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step
        seen[step] = [p.detach().clone() for p in self.parameters()]
        loss = original(self, batch, batch_idx)
        if step == 2:
            return loss * float("nan") if where == "loss" else loss + _Infinite.apply(next(self.parameters())).sum() * 0
        return loss

    monkeypatch.setattr(Distillation, "training_step", training_step)
    train(config(folder, n_steps=5))
    assert all(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[3], seen[4], strict=True))
    assert all(value.isfinite().all() for value in weights(folder).values())


class _Infinite(torch.autograd.Function):
    """Finite forward, infinite gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, float("inf"))


def test_gradients_that_stay_non_finite_stop_the_run_with_its_last_checkpoint(folder, monkeypatch):
    original = Distillation.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step >= 4 else loss

    monkeypatch.setattr(Distillation, "training_step", training_step)
    with pytest.raises(NonFinite, match=f"{PATIENCE} steps in a row"):
        train(config(folder, n_steps=40, save_every_n_steps=4))
    assert all(value.isfinite().all() for value in weights(folder).values())


def test_several_sites_are_taught_at_once_and_stored_in_one_file(folder):
    outcome = train(config(folder, target="level3,IN01", n_steps=1))
    file = load_students(folder / "out" / "hyena.pt")
    assert [student.spec.short for student in file.students.values()] == ["IN01", "M00"]
    assert {"val/relative_mse/IN01", "val/relative_mse/M00", "val/cosine/M00"} <= outcome.metrics.keys()
    assert set(outcome.block_seconds) == {"IN01", "M00"}


def test_windows_as_large_as_the_grid_are_attention_before_any_training(folder, previews_drawn):
    outcome = train(config(folder, operator="windows", n_steps=1, lr=1e-9))
    assert outcome.metrics["val/relative_mse/IN01"] < 1e-6 and outcome.metrics["val/image_psnr"] > 60


@pytest.mark.parametrize("operator", ["hyena2d", *gated(["linear", "pointwise", "causal", "bidirectional", "safari"])])
def test_every_operator_learns(folder, operator):
    given = (
        {"operator_options": "landmarks=4,content=landmarks"} if operator == "hyena2d" else {}
    )  # clusters start near
    train(config(folder, operator=operator, n_steps=25, validate_every_n_steps=0, lr=1e-2, warmup_steps=0, **given))
    losses = [value for _, value in curve(folder, "train/loss/IN01")]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("data", [*gated(["trajectories"]), "noise"])
def test_other_sources_train(folder, data):
    outcome = train(config(folder, data=data, n_steps=2))
    assert outcome.metrics["val/relative_mse/IN01"] > 0


def test_a_run_leaves_its_config_its_curves_its_pictures_and_its_students(folder, previews_drawn):
    outcome = train(config(folder, save_every_n_steps=2, keep=2))
    assert sorted(p.name for p in (outcome.folder / "checkpoints").iterdir()) == ["step-00006.ckpt", "step-00008.ckpt"]
    names = [f"Hyena-{s:05d}.safetensors" for s in (6, 8)]
    assert sorted(p.name for p in outcome.folder.glob("*.safetensors")) == names
    assert (outcome.folder / "config.yaml").is_file()
    (run,) = (folder / "logs").iterdir()
    assert "train/loss/IN01" in next(run.glob("csv-*/metrics.csv")).read_text()
    tags = set()
    for events in run.glob("events*"):
        reader = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
        for tag in reader.Tags()["images"]:
            tags |= {(tag, image.step) for image in reader.Images(tag)}
    for step in (0, 4, 8):
        assert ("site IN01: input | teacher | student | difference", step) in tags
        assert ("image: teacher | student | difference", step) in tags
    training = load_students(outcome.exported).training
    assert training["step"] == 8 and len(training["teacher_sha256"]) == 64 and training["config"]["seed"] == 3


def test_a_drawn_seed_is_recorded_and_repeats_the_run(folder, tmp_path_factory):
    few = dict(n_steps=2, validate_every_n_steps=0)
    first = train(config(folder, seed=-1, **few))
    seed = load_students(first.exported).training["config"]["seed"]
    again = tmp_path_factory.mktemp("again")
    shutil.copytree(folder / "out" / "cache", again / "out" / "cache")
    train(config(again, seed=seed, **few))
    assert seed >= 0
    assert_equal_weights(weights(folder), weights(again))


def test_a_dry_run_does_one_step_one_save_and_one_reload(folder, capsys):
    outcome = train(config(folder, n_steps=1000, dry_run=True))
    assert load_students(outcome.exported).training["step"] == 1
    assert not (folder / "out" / "hyena.pt").exists()  # what is there from a real run stays
    said = capsys.readouterr().out
    assert "estimate" in said and "previews" in said and "min for 1000 steps of batch 6" in said  # of the real run


def run_of(folder) -> Path:
    (run,) = [path.parent for path in (folder / "out").glob("*/config.yaml")]
    return run


def test_resuming_a_finished_run_does_nothing(finished, capsys):
    before = weights(finished)
    train(config(finished, n_steps=2, resume="auto"))
    assert "nothing to do" in capsys.readouterr().out
    assert_equal_weights(before, weights(finished))


@pytest.mark.gate
def test_a_finished_run_goes_on_when_more_steps_are_asked_for(finished, capsys):
    outcome = train(config(finished, n_steps=4, resume="auto", lr=5e-3))
    assert load_students(outcome.exported).training["step"] == 4
    assert "n_steps 2 -> 4" in capsys.readouterr().out


def test_resume_passes_over_dry_runs_and_refuses_another_seed_and_strange_places(finished, capsys):
    real = run_of(finished)
    train(config(finished, dry_run=True, seed=9))
    outcome = train(config(finished, n_steps=3, resume="auto", lr=5e-3, validate_every_n_steps=0))
    assert outcome.folder == real and "n_steps 2 -> 3" in capsys.readouterr().out
    with pytest.raises(BadInput, match="seed=77 differs from the run's own, 3"):
        train(config(finished, n_steps=4, resume="auto", seed=77))
    (finished / "elsewhere").mkdir()
    moved = shutil.copy(real / "checkpoints" / "step-00003.ckpt", finished / "elsewhere")
    with pytest.raises(BadInput, match="no checkpoint in a run's folder"):
        train(config(finished, n_steps=4, resume=str(moved)))
    with pytest.raises(BadInput, match="exclude each other"):
        config(finished, resume="auto", dry_run=True)


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(folder):
    first = train(config(folder, n_steps=4, save_every_n_steps=1, validate_every_n_steps=0))
    older = first.folder / "checkpoints" / "step-00002.ckpt"
    train(config(folder, n_steps=3, validate_every_n_steps=0, resume=str(older)))
    names = sorted(path.name for path in older.parent.iterdir())
    assert names == ["abandoned-00003.ckpt", "abandoned-00004.ckpt", "step-00002.ckpt", "step-00003.ckpt"]


def test_the_stored_metrics_are_of_the_exported_step(folder):
    training = load_students(train(config(folder, n_steps=3, validate_every_n_steps=2)).exported).training
    assert training["metrics_of_step"] == training["step"] == 3
    assert [step for step, _ in curve(folder, "val/relative_mse/IN01")] == [0, 2, 3]


def test_resume_refuses_another_experiment_and_lists_the_differences(finished):
    with pytest.raises(BadInput, match=r"operator: hyena2d there, causal now.*width: 64 there, 72 now"):
        train(config(finished, n_steps=4, resume=str(run_of(finished)), operator="causal", width=72, height=64))


@pytest.mark.gate
def test_auto_resume_falls_back_to_the_newest_checkpoint_that_is_whole(folder, capsys):
    first = train(config(folder, save_every_n_steps=3))
    newest = first.folder / "checkpoints" / "step-00008.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = train(config(folder, resume="auto"))
    assert "passed over" in capsys.readouterr().out and outcome.folder == first.folder
    with pytest.raises(BadInput, match="damaged"):
        newest.write_bytes(b"nonsense")
        train(config(folder, resume=str(newest)))


def test_a_checkpoint_with_a_payload_is_refused_unexecuted(folder, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    target = folder / "executed"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {target}",)

    path = folder / "out" / "run" / "checkpoints" / "step-00001.ckpt"
    path.parent.mkdir(parents=True)
    (folder / "out" / "run" / "config.yaml").touch()
    torch.save({"global_step": 1, "sd_hyena": {"config": {}}, "x": Payload()}, path)
    with pytest.raises(BadInput, match="not executed"):
        train(config(folder, resume=str(path)))
    assert not target.exists()


def test_a_run_of_the_last_release_is_resumed_by_what_its_options_mean_now():
    now = config(Path("x"), operator_options="landmarks=64")
    facts = {"teacher_sha256": "0", "sites": [IN01]}
    stored = {name: value for name, value in to_dict(now).items() if name != "operator_options"}
    stored["hyena2d_content"] = "clusters"
    for landmarks, words in ((64, None), (32, r"operator_options: .*landmarks=32,.* there, .*landmarks=64,.* now")):
        old = stored | {"landmarks": landmarks, "hyena2d_local": 9, "hyena2d_norm": True, "hyena_w": 3.0}
        found = Resumable(Path("x.ckpt"), {"global_step": 1, "sd_hyena": {"config": old, **facts}})
        with pytest.raises(BadInput, match=words) if words else contextlib.nullcontext():
            found.check(now, facts)


def test_training_starts_from_a_given_student_and_refuses_one_of_another_shape(finished):
    folder, start = finished, finished / "start.safetensors"
    shutil.copy(folder / "out" / "hyena.safetensors", start)
    before, few = weights(folder), dict(n_steps=1, validate_every_n_steps=0)
    train(config(folder, **few, pretrained_weight=str(start), lr=1e-9, warmup_steps=0))
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, before[name], atol=1e-7, rtol=1e-6)
    with pytest.raises(BadInput, match="pretrained_weight"):
        train(config(folder, n_steps=1, pretrained_weight=str(start), operator_options="landmarks=16"))


def test_two_runs_in_the_same_second_get_two_folders(folder):
    from sd_hyena.distil.run_folder import new_run_folder

    given = config(folder)
    assert len({new_run_folder(given, "20260101-000000") for _ in range(3)}) == 3


@pytest.mark.gate
def test_options_survive_the_run_in_its_config_file(folder):
    from sd_hyena.options.command_line import parse

    outcome = train(config(folder, n_steps=1, operator_options="local=5", ema=0.5))
    assert parse(TrainConfig, ["--config", str(outcome.folder / "config.yaml")]) == dataclasses.replace(
        config(folder, n_steps=1, operator_options="local=5", ema=0.5)
    )


@pytest.mark.slow
def test_auto_runs_a_pilot_shows_its_choice_and_trains_the_chosen_sites_from_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(pilot, "speedup", lambda *_, **__: 2.0)  # at so small a size attention is faster everywhere
    monkeypatch.setattr(pilot, "STEPS", 10)
    given = config(folder, target="auto", budget="1.0001x", n_steps=2, width=256, batch_size=2, num_samples=2)
    exported = train(dataclasses.replace(given, validate_every_n_steps=0, operator_options="rank=1")).exported
    printed = capsys.readouterr().out
    assert "pilot: every site that a student makes cheaper, 10 steps" in printed and "times cheaper" in printed
    chosen = load_students(exported).students
    assert 1 <= len(chosen) < 16 and all("attn1" in name for name in chosen)
