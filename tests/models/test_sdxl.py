"""A pipeline of SDXL's layout, tiny and with random weights, through training, generation and evaluation."""

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from sd_hyena.cost.operations import unet_flops
from sd_hyena.distil.training import train
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.evaluation import evaluate
from sd_hyena.generate import order
from sd_hyena.generate.generation import generate
from sd_hyena.models.condition import condition
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.checkpoint import load_students

SHORTS = [
    "IN04.0",
    "IN04.1",
    "IN05.0",
    "IN05.1",
    "M00.0",
    "M00.1",
    "OUT00.0",
    "OUT00.1",
    "OUT01.0",
    "OUT01.1",
    "OUT02.0",
]


@pytest.fixture(scope="module")
def model(tiny_sdxl, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    scheduler, tiny_sdxl.scheduler = tiny_sdxl.scheduler, EulerDiscreteScheduler(beta_schedule="scaled_linear")
    tiny_sdxl.save_pretrained(folder)
    tiny_sdxl.scheduler = scheduler
    (folder / "prompts.txt").write_text("a red circle on blue\ntwo green squares on white\na black triangle on red\n")
    return folder


def test_the_condition_is_what_the_pipeline_itself_tells_its_unet(model):
    pipe = load_pipeline(model, torch.device("cpu"), torch.float32)
    told = []
    hook = pipe.unet.register_forward_pre_hook(lambda _m, _args, kwargs: told.append(kwargs), with_kwargs=True)
    pipe("a red circle on blue", width=72, height=104, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    hook.remove()
    given = told[0]["added_cond_kwargs"] | {"encoder_hidden_states": told[0]["encoder_hidden_states"]}
    for row, prompt in enumerate(("", "a red circle on blue")):
        ours = condition(pipe, prompt, 72, 104)
        assert ours.keys() == given.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value[0], given[name][row], msg=name)


def test_sites_that_share_a_block_are_numbered_and_its_unet_can_be_counted(model):
    unet = load_pipeline(model, torch.device("cpu"), torch.float32).unet
    assert [site.short for site in find_sites(unet)][: len(SHORTS)] == SHORTS
    assert unet_flops(unet, (16, 24)) > unet_flops(unet, (16, 16)) > 0


@pytest.mark.slow
def test_a_student_is_trained_in_every_stage_drawn_with_and_evaluated(model, tmp_path):
    shared = dict(out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"), device="cpu", seed=1)
    sizes = dict(width=96, height=64, num_samples=4, sample_steps=2, batch_size=2, n_steps=3, warmup_steps=0)
    sizes |= dict(operator_options="landmarks=4")  # fewer than tokens, else it is attention itself
    before = ""
    for stage in ("layerwise", "joint", "end_to_end"):
        given = dict(teacher_model=str(model), target="IN04.0,IN04.1", stage=stage, pretrained_weight=before)
        outcome = train(TrainConfig(**given, **sizes, **shared))
        before = str(outcome.exported)
    file = load_students(outcome.exported)
    assert [s.spec.short for s in file.students.values()] == ["IN04.0", "IN04.1"]
    student = str(tmp_path / "out" / "hyena.pt")
    common = dict(
        model=str(model), width=64, height=96, steps=2, seed=3, device="cpu", prompt="two green squares on white"
    )
    plain, ours = (
        generate(GenerateConfig(**common, hyena=hyena, out_dir=str(tmp_path / name)))[0]
        for name, hyena in (("plain", ""), ("ours", student))
    )
    assert Image.open(plain).size == (64, 96) and Image.open(plain).tobytes() != Image.open(ours).tobytes()
    report = evaluate(
        EvaluationConfig(
            students=student, model=str(model), sizes="64,96x64", guidance="5", images=1, states=2, steps=2,
            device="cpu", out_dir=str(tmp_path / "report"),
        )
    )  # fmt: skip
    prediction = report["students"]["hyena"]["sizes"]["96x64"]["prediction"]
    assert 0 < prediction["conditional"] < 10 and 0 < prediction["unconditional"] < 10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["redraw", "diffusehigh", "demofusion", "deep_shrink"])
@pytest.mark.parametrize("hyena", ["", "landmarks:16:all"])
def test_a_picture_grows_by_every_method_and_repeats_itself(model, tmp_path, monkeypatch, method, hyena):
    monkeypatch.setattr(order, "own_side", lambda _: 64)
    given = dict(
        model=str(model), device="cpu", prompt="a red circle", width=136, height=104, steps=4, seed=3, hyena=hyena
    )
    plain, grown, again = (
        generate(GenerateConfig(**given, num_images=1, grow=grow, out_dir=str(tmp_path / name)))[0]
        for name, grow in (("plain", "off"), ("grown", method), ("again", method))
    )
    pictures = [np.array(Image.open(path)) for path in (plain, grown, again)]
    assert pictures[1].shape == (104, 136, 3)
    assert np.array_equal(pictures[1], pictures[2]) and not np.array_equal(pictures[0], pictures[1])
