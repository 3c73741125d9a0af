"""What each stage asks of the students: which errors there are, where their gradients go, what the identity gives."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from sd_hyena.distil.stages import EndToEnd, Joint, Layerwise, prediction_error
from sd_hyena.sites import find_sites, select
from sd_hyena.students.losses import error_and_spread, guided, min_snr_weight
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.students.teacher import Teacher


class Attention(nn.Module):
    """A student that is the site's attention, with one parameter to learn: a factor of its output."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        object.__setattr__(self, "attention", attention)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x, projections, size):
        return self.factor * self.attention(x)


@pytest.fixture
def teacher(unet):
    return Teacher(unet, select(find_sites(unet), "IN01,OUT11"))


@pytest.fixture
def identical(teacher):
    return {site.name: Attention(teacher.unet.get_submodule(site.name)) for site in teacher.sites}


@pytest.fixture
def batch(states):
    latents, timestep, text = states
    return {
        "latents": latents,
        "timestep": timestep,
        "text": text,
        "empty": {name: torch.zeros_like(value) for name, value in text.items()},
        "guidance": torch.tensor([3.25, 8.0]),
    }


def stages(teacher):
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    return [Layerwise(teacher), Joint(teacher), EndToEnd(teacher, scheduler, 0.1, 0.5)]


@pytest.mark.parametrize("index", range(3))
def test_a_student_that_is_the_attention_makes_no_error_in_any_stage(teacher, identical, batch, index):
    stage = stages(teacher)[index]
    errors = stage.errors(identical, stage.lesson(batch))
    assert set(errors) >= set(identical)
    assert all(error == 0 for error in errors.values())
    assert prediction_error(teacher, identical, batch)[0] == 0


@pytest.mark.parametrize("index", range(3))
def test_every_error_alone_reaches_the_students_it_should_and_nothing_of_the_unet(teacher, identical, batch, index):
    """IN01 comes before OUT11: alone in its own site's error layer by layer, in everything that follows it jointly."""
    stage, (first, last) = stages(teacher)[index], list(identical)
    for student in identical.values():
        student.factor.data.fill_(0.9)
    for name in stage.errors(identical, stage.lesson(batch)):
        for student in identical.values():
            student.factor.grad = None
        stage.errors(identical, stage.lesson(batch))[name].backward()
        reached = {site for site, student in identical.items() if student.factor.grad is not None}
        assert reached == ({name} if index == 0 or name == first else {first, last}), name
        assert all(identical[site].factor.grad.abs() > 0 for site in reached)
    assert all(p.grad is None for p in teacher.unet.parameters())


def test_the_end_to_end_errors_are_their_definition(teacher, identical, batch):
    scheduler = DDPMScheduler(prediction_type="epsilon")
    stage = EndToEnd(teacher, scheduler, feature_weight=0.0, guidance_weight=2.0)
    for student in identical.values():
        student.factor.data.fill_(0.5)
    with torch.no_grad():
        errors = stage.errors(identical, stage.lesson(batch))
        given = batch["latents"], batch["timestep"]
        (tc, tu), (sc, su) = (
            [teacher.observe(*given, batch[text], s).prediction.flatten(2).mT for text in ("text", "empty")]
            for s in (None, identical)
        )
    weight = min_snr_weight(scheduler, batch["timestep"])

    def expected(ours, truth, w):
        error, spread = error_and_spread(ours, truth)
        return (w * error).sum() / (w * spread).sum()

    assert set(errors) == {"prediction", "guidance"}
    both = expected(torch.cat([sc, su]), torch.cat([tc, tu]), weight.repeat(2))
    torch.testing.assert_close(errors["prediction"], both, rtol=1e-4, atol=0)
    scale = batch["guidance"][:, None, None]
    pulled = expected(su + scale * (sc - su), tu + scale * (tc - tu), weight)
    torch.testing.assert_close(errors["guidance"], 2 * pulled, rtol=1e-4, atol=0)


def test_guidance_multiplies_the_difference_of_the_branches():
    c, u = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(guided(c, u, 1.0), c)
    torch.testing.assert_close(guided(c, u, 0.0), u)
    torch.testing.assert_close(guided(c, u, 7.0) - u, 7 * (c - u))


@pytest.mark.parametrize("kind, below", [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weighs_as_published(kind, below):
    scheduler = DDPMScheduler(prediction_type=kind)
    t = torch.tensor([0, 10, 300, 999])
    snr = scheduler.alphas_cumprod[t].double() / (1 - scheduler.alphas_cumprod[t].double())
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + below)
    torch.testing.assert_close(min_snr_weight(scheduler, t).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.gate
def test_a_few_joint_steps_on_one_lesson_lower_the_prediction_error(unet, batch):
    torch.manual_seed(0)
    teacher = Teacher(unet, select(find_sites(unet), "level0"))
    options = {"heads": 2, "local": 3, "reach": 4, "rank": 2, "content": "landmarks"}  # which start farther away
    students = {
        site.name: build_student(StudentSpec(site.name, site.short, site.channels, "hyena2d", options, None))
        for site in teacher.sites
    }
    stage = Joint(teacher)
    lesson = stage.lesson(batch)
    optimizer = torch.optim.Adam([p for s in students.values() for p in s.parameters()], 5e-3)
    before, spread = prediction_error(teacher, students, batch)
    assert spread > 0
    for _ in range(8):
        loss = sum(stage.errors(students, lesson).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert prediction_error(teacher, students, batch)[0] < 0.8 * before


def test_an_observation_without_students_is_the_plain_forward(teacher, batch):
    given = batch["latents"], batch["timestep"], batch["text"]
    with torch.no_grad():
        seen = teacher.observe(*given)
        assert torch.equal(seen.prediction, teacher.unet(*given[:2], **given[2]).sample)
    targets = teacher.activations(*given)
    for site in teacher.sites:
        assert torch.equal(seen.outputs[site.name], targets[site.name].target)
        assert seen.blocks[site.name].shape == seen.outputs[site.name].shape
