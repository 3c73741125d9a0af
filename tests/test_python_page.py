"""docs/python.md: every block of code runs as it stands on the page, in a folder with the files that it names.

What surrounds them makes them small: half as wide, fewer denoising and training steps, a student that nobody trained.
"""

import re
import sys
import types

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import sd_hyena
from sd_hyena.generate import order
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.operators import OPERATORS
from sd_hyena.options.sampler import SAMPLERS, set_scheduler
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import build_student, spec_for
from tests.conftest import IN01, OUT11, ROOT

PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"^## (.*?)\n.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))
TRAINING = dict(n_steps=1, width=64, height=64, batch_size=2, num_samples=2, sample_steps=1, validate_every_n_steps=0)


@pytest.fixture
def run(tmp_path, monkeypatch, unet):
    """Runs the example under a heading as a script of its own; its names."""
    (tmp_path / "stable-diffusion-v1-5").symlink_to(SHIPPED_MODEL)
    options = sd_hyena.TrainConfig().options_of_operator()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        students = [build_student(spec_for(s, "hyena2d", options, (8, 8))) for s in select(find_sites(unet), "IN01")]
        for parameter in (
            p for student in students for p in student.parameters()
        ):  # new it is attention itself, nearly
            torch.nn.init.normal_(parameter, std=0.2)
    save_students(tmp_path / "hyena.pt", StudentFile({student.spec.site: student for student in students}))
    monkeypatch.chdir(tmp_path)
    call = StableDiffusionPipeline.__call__
    half = lambda given: {side: given[side] // 2 for side in ("width", "height") if given.get(side, 0) > 256}
    few = lambda pipe, *args, **given: call(pipe, *args, **given | half(given) | {"num_inference_steps": 1})
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", few)
    for name, small in (("TrainConfig", TRAINING), ("GenerateConfig", dict(steps=2, width=64, height=64))):
        kind = getattr(sd_hyena, name)
        small = small | {"device": "cpu"}
        monkeypatch.setattr(sd_hyena, name, lambda kind=kind, small=small, **given: kind(**given | small))

    def script(heading: str) -> dict:
        module = types.ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)
        exec(compile(EXAMPLES[heading], f"docs/python.md, {heading}", "exec"), module.__dict__)
        return module.__dict__

    return script


def test_the_page_has_seven_examples_and_names_all_that_the_package_offers():
    assert len(EXAMPLES) == PAGE.count("```python") == 7
    table = PAGE.split("| | |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(sd_hyena.__all__)


def test_students_in_a_pipeline_that_one_has(run, tmp_path):
    names = run("Students in a pipeline that you have")
    assert Image.open(tmp_path / "circle.png").size == (256, 256)
    plain = names["pipe"]("a red circle on blue", width=64, height=64, generator=torch.Generator().manual_seed(1))
    again = names["load_students"]("hyena.pt", names["pipe"].unet)
    with names["swapped"](names["pipe"].unet, again):
        other = names["pipe"]("a red circle on blue", width=64, height=64, generator=torch.Generator().manual_seed(1))
    assert plain.images[0].tobytes() != other.images[0].tobytes()  # outside of its block there was no student left


@pytest.mark.gate
def test_tiles_and_regions_around_it(run, tmp_path):
    run("Tiles and regions around it")
    assert Image.open(tmp_path / "regions.png").size == (256, 192)


def test_the_exact_vae_alone_is_the_vae_in_one_piece(run):
    names = run("The exact VAE alone")
    with torch.no_grad():
        whole = names["vae"].decode(names["latents"]).sample
    assert names["picture"].shape == (1, 3, 256, 384)
    torch.testing.assert_close(names["picture"], whole, atol=1e-4, rtol=0)


def test_training_from_a_script(run):
    names = run("Training from a script")
    assert list(names["students"]) == [IN01, OUT11] and "val/relative_mse/OUT11" in names["outcome"].metrics


def test_many_pictures_and_who_watches(run, tmp_path, capsys):
    run("Many pictures, and who watches")
    drawn = sorted(path.name for path in tmp_path.glob("*.png"))
    assert drawn == [f"{p}, {n}.png" for p in ("a red circle on blue", "two yellow squares on green") for n in (0, 1)]
    assert "6.0 of 6 steps" in capsys.readouterr().out


def test_a_picture_that_grows(run, tmp_path, monkeypatch):
    small = dict(steps=2, width=104, height=72, device="cpu")
    monkeypatch.setattr(order, "own_side", lambda _: 80)
    monkeypatch.setattr(sd_hyena, "GenerateConfig", lambda **given: GenerateConfig(**given | small))
    run("A picture that grows")
    assert [Image.open(tmp_path / f"{name}.png").size for name in ("stage 1", "grown")] == [(96, 64), (104, 72)]


def test_an_operator_of_ones_own(run, unet, monkeypatch):
    monkeypatch.setitem(OPERATORS, "means", None)  # taken out again afterwards
    outcome = run("An operator of your own")["outcome"]
    (student,) = load_students(outcome.exported, unet).values()
    assert student.spec.operator == "means" and student.spec.options == {"side": 7}
    assert student.mixer.mean.kernel_size == 7 and student.spec.serves((9, 13))


def test_a_sampler_is_one_entry(own_pipe, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "dpm2", None)
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text("utf-8"), re.DOTALL)
    exec(example, {})
    set_scheduler(own_pipe, "dpm2", karras=True)
    assert type(own_pipe.scheduler).__name__ == "KDPM2DiscreteScheduler" and own_pipe.scheduler.config.use_karras_sigmas
