import json
from types import SimpleNamespace

import torch

from sd_hyena.distil import previews
from sd_hyena.distil.previews import Previews, drawn_with, site_picture
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.student import Projections
from sd_hyena.students.teacher import Activation

NONE = Projections(None, None, None, None)


def activation(h=6, w=10):
    torch.manual_seed(0)
    return Activation(torch.randn(2, h * w, 8), torch.randn(2, h * w, 8), (h, w), torch.tensor([1, 2]), NONE)


def panels(picture):
    return picture.chunk(4, dim=-1)


def test_a_perfect_student_looks_like_its_teacher_and_the_difference_is_black():
    a = activation()
    picture = site_picture(a, a.target, side=60)
    assert picture.shape == (3, 60, 400) and picture.min() >= 0 and picture.max() <= 1
    _, teacher, student, difference = panels(picture)
    assert torch.equal(teacher, student) and difference.max() == 0 and teacher.std() > 0.05


def test_an_error_shows_where_it_is():
    a = activation()
    answer = a.target.clone()
    answer[0, 2 * 10 + 7] += 100  # row 2, column 7
    difference = panels(site_picture(a, answer, side=60))[3]
    lit = difference[0] > 0
    assert lit[20:30, 70:80].all() and lit.sum() == 100


def test_a_site_with_fewer_than_three_channels_has_a_picture_too():
    x = torch.randn(1, 12, 2)
    assert site_picture(Activation(x, x, (3, 4), torch.tensor([0]), NONE), x).isfinite().all()


def test_a_preview_has_the_steps_and_the_guidance_that_its_model_says(monkeypatch):
    own = json.loads((SHIPPED_MODEL / "generation.json").read_text())
    assert drawn_with("") == (own["steps"], own["cfg_scale"])  # imported before the tests made it short
    monkeypatch.setattr(previews, "drawn_with", drawn_with)
    monkeypatch.setattr(previews, "decoded", lambda _pipe, _latents: torch.zeros(8, 8, 3).byte().numpy())
    asked = []
    pipe = lambda *_, **given: asked.append(given) or SimpleNamespace(images=None)
    Previews(pipe, ["a"], 64, 64)._drawn("pictures")
    assert {(given["num_inference_steps"], given["guidance_scale"]) for given in asked} == {
        (own["steps"], own["cfg_scale"])
    }
