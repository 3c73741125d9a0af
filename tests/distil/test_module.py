from itertools import pairwise

import pytest
import torch

from sd_hyena.distil.module import Distillation
from sd_hyena.distil.stages import Layerwise
from sd_hyena.students.losses import relative_mse
from sd_hyena.students.student import Projections, StudentSpec, build_student
from sd_hyena.students.teacher import Activation


def activation(size=(3, 4), batch=2, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, size[0] * size[1], 8)
    linear = [torch.nn.Linear(8, 8).requires_grad_(False) for _ in range(4)]
    projections = Projections(*linear[:3], torch.nn.ModuleList([linear[3], torch.nn.Dropout(0.0)]))
    return Activation(x, torch.randn_like(x), size, torch.tensor([100, 800])[:batch], projections)


def module(**options):
    torch.manual_seed(1)
    specs = [
        StudentSpec(name, name, 8, operator, {}, (3, 4)) for name, operator in (("a.x", "causal"), ("b", "pointwise"))
    ]
    given = {"lr": 1e-2, "n_steps": 10, **options}
    return Distillation({spec.site: build_student(spec) for spec in specs}, Layerwise(None), **given)


def test_it_holds_students_only():
    names = {name.split(".")[0] for name in module().state_dict()}
    assert names == {"students"}
    assert set(module().by_site()) == {"a.x", "b"}


def test_each_sites_gradient_comes_from_its_own_error():
    distillation = module()
    batch = {"a.x": activation(seed=2), "b": activation(seed=3)}
    loss = relative_mse(distillation(batch)["b"], batch["b"].target)
    loss.backward()
    by = distillation.by_site()
    assert all(p.grad is None for p in by["a.x"].parameters())
    assert all(p.grad is not None for p in by["b"].parameters())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_learning_rate_warms_up_and_follows_its_schedule(schedule):
    distillation = module(schedule=schedule, warmup_steps=3, n_steps=11, lr=1.0)
    given = distillation.configure_optimizers()
    rates = []
    for _ in range(12):
        rates.append(given["optimizer"].param_groups[0]["lr"])
        given["optimizer"].step()
        given["lr_scheduler"]["scheduler"].step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    if schedule == "constant":
        assert rates[4:] == [1.0] * 8
    else:
        assert all(a > b for a, b in pairwise(rates[3:])) and rates[-1] == pytest.approx(0)
        assert rates[7] == pytest.approx(0.5)


@pytest.mark.parametrize("given, rate", [({}, 0.1), ({"lr_projections": 0.5}, 0.5)])
def test_the_change_of_the_projections_learns_at_a_rate_of_its_own(given, rate):
    distillation = module(lr=1.0, **given)
    names = {parameter: name for name, parameter in distillation.named_parameters()}
    rates = {
        names[parameter]: group["initial_lr"]
        for group in distillation.configure_optimizers()["optimizer"].param_groups
        for parameter in group["params"]
    }
    assert rates.keys() == set(names.values())
    changes = {name for name in rates if ".change" in name}
    assert len(changes) > 4 and all(rates[name] == rate for name in changes)
    assert all(rates[name] == 1.0 for name in rates.keys() - changes if not name.endswith("pos_emb.z"))


def test_one_batch_can_be_learnt_by_heart():
    distillation = module(lr=2e-2)
    batch = {"a.x": activation(seed=2), "b": activation(seed=3)}
    optimizer = distillation.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(150):
        loss = sum(relative_mse(answer, batch[site].target) for site, answer in distillation(batch).items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
