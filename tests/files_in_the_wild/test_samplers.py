"""What a sampler cannot do is said."""

import inspect
import json
import shutil
import types

import diffusers
import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.generate import engine
from sd_hyena.generate.generation import generate
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.sampler import SAMPLERS, note_on_steps, set_scheduler
from sd_hyena.options.shipped import SHIPPED_MODEL
from tests.files_in_the_wild import layouts

CANNOT = [name for name, sampler in SAMPLERS.items() if not sampler.pure_noise]


@pytest.fixture(scope="module")
def from_pure_noise(tmp_path_factory):
    """The shipped model as if it had been trained to zero terminal SNR."""
    folder = tmp_path_factory.mktemp("ztsnr") / "model"
    shutil.copytree(SHIPPED_MODEL, folder)
    levels = folder / "scheduler" / "scheduler_config.json"
    levels.write_text(json.dumps(json.loads(levels.read_text()) | {"rescale_betas_zero_snr": True}))
    return folder


def small(tmp_path, **options):
    base = dict(width=64, steps=10, num_images=1, seed=1, prompt="a red circle", device="cpu", out_dir=str(tmp_path))
    return GenerateConfig(**base | options)


def test_which_samplers_start_from_pure_noise_is_what_diffusers_says():
    for name, sampler in SAMPLERS.items():
        parameters = inspect.signature(getattr(diffusers, sampler.scheduler).__init__).parameters
        assert sampler.pure_noise == ("rescale_betas_zero_snr" in parameters), name
        assert {"prediction_type", "timestep_spacing", "beta_schedule", "trained_betas"} <= parameters.keys(), name
    assert CANNOT == ["heun", "lms", "pndm"]


@pytest.mark.parametrize("name", CANNOT)
def test_a_sampler_that_cannot_start_from_pure_noise_is_refused_before_the_model_is_loaded(
    from_pure_noise, tmp_path, state, monkeypatch, name
):
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: pytest.fail("it was loaded"))
    file = layouts.saved(tmp_path / "mine.safetensors", state | {"ztsnr": torch.empty(0)})
    for model in (from_pure_noise, file):
        with pytest.raises(BadInput, match=rf"scheduler='{name}' cannot start.*ztsnr.*use ddim, euler") as error:
            generate(small(tmp_path, model=str(model), scheduler=name))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in CANNOT])
def test_the_others_start_from_pure_noise(from_pure_noise, name):
    levels = json.loads((from_pure_noise / "scheduler" / "scheduler_config.json").read_text())
    pipe = types.SimpleNamespace(scheduler=diffusers.DDIMScheduler.from_config(levels))
    set_scheduler(pipe, name)
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-7  # of the shipped levels .0047


def test_without_pure_noise_every_sampler_is_taken(tmp_path):
    levels = json.loads((SHIPPED_MODEL / "scheduler" / "scheduler_config.json").read_text())
    for name in SAMPLERS:
        set_scheduler(types.SimpleNamespace(scheduler=diffusers.DDIMScheduler.from_config(levels)), name)


@pytest.mark.gate
def test_too_few_steps_are_noted_with_the_way_out(tmp_path, loaded_once, capsys):
    generate(small(tmp_path, scheduler="heun", steps=9))
    assert "note: heun draws badly in 9 steps; give it 10 or more" in "".join(capsys.readouterr())
    generate(small(tmp_path, scheduler="heun", steps=10))
    generate(small(tmp_path, scheduler="euler", steps=2))
    assert "draws badly" not in "".join(capsys.readouterr())


def test_of_a_picture_that_is_drawn_again_the_steps_that_are_taken_count(tmp_path, loaded_once, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "x.png")
    generate(small(tmp_path, scheduler="pndm", steps=12, init_image=str(tmp_path / "x.png"), strength=0.5))
    assert "note: pndm draws badly in 6 steps" in "".join(capsys.readouterr())


@pytest.mark.gate
@torch.no_grad()
def test_the_samplers_that_are_named_draw_worse_in_few_steps_than_those_that_are_offered(shared_pipe):
    """Against 40 steps of DDIM; the rest agree with it three times better."""

    def latents(name, steps):
        shared_pipe.scheduler = diffusers.DDIMScheduler.from_config(levels)
        set_scheduler(shared_pipe, name)
        options = dict(width=64, height=64, num_inference_steps=steps, guidance_scale=5.0, output_type="latent")
        return shared_pipe("a red circle on blue", generator=torch.Generator().manual_seed(0), **options).images

    before, levels = shared_pipe.scheduler, dict(shared_pipe.scheduler.config)
    try:
        truth = latents("ddim", 40)
        error = {n: float((latents(n, 4) - truth).square().mean()) for n in ("ddim", "dpm++_2m", "heun", "pndm")}
    finally:
        shared_pipe.scheduler = before
    assert min(error["heun"], error["pndm"]) > 1.5 * max(error["ddim"], error["dpm++_2m"]), error
    assert all(note_on_steps(name, 4) for name in ("heun", "pndm")) and not note_on_steps("dpm++_2m", 4)


@pytest.mark.parametrize("steps", [-1, 1001, 10**6])
def test_more_steps_than_noise_levels_are_refused(steps):
    with pytest.raises(BadInput, match=f"steps={steps} must lie between 1 and 1000"):
        GenerateConfig(steps=steps)
