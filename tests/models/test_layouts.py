"""The configs that ship, on the real layouts: every weight of Stable Diffusion 1.5 and SDXL, random, one step on a CPU."""

import copy
import gc

import pytest
import torch
import yaml

from sd_hyena.distil.stages import Layerwise
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.recipe import read_recipe
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import build_student, spec_for
from sd_hyena.students.teacher import Teacher
from tests.conftest import ROOT

PIXELS = 128  # not the config's own: a CPU has to do it


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_a_shipped_config_is_a_complete_run(path):
    config = TrainConfig(**yaml.safe_load(path.read_text()))
    assert config.batch_size % (config.micro_batch_size or 1) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_a_shipped_recipe_is_a_complete_run(path):
    assert len(read_recipe([str(path)])) >= 1


@pytest.mark.parametrize(
    "layout, name, sites", [("sd15", "sd15_level0", 5), ("sd15", "sd15_2048", 1), ("sdxl", "sdxl_level1", 10)]
)
def test_the_targets_of_a_shipped_config_exist_in_its_model(request, layout, name, sites):
    config = TrainConfig(**yaml.safe_load((ROOT / f"configs/train/{name}.yaml").read_text()))
    assert len(select(find_sites(request.getfixturevalue(layout)), config.target)) == sites


def materialised(unet):
    """Random weights in half precision, 5 GiB for SDXL; norms are the identity."""
    unet = copy.deepcopy(unet).to(torch.bfloat16).to_empty(device="cpu")
    for name, p in unet.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            torch.nn.init.constant_(p, float("norm" in name and name.endswith("weight")))
    return unet


@pytest.mark.slow
@pytest.mark.parametrize("layout, name, told", [
    ("sd15", "sd15_level0", {"encoder_hidden_states": (77, 768)}),
    ("sdxl", "sdxl_level1", {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)}),
])  # fmt: skip
def test_one_step_on_the_real_layout_lowers_the_error_of_every_site(request, layout, name, told):
    config = TrainConfig(**yaml.safe_load((ROOT / f"configs/train/{name}.yaml").read_text()))
    unet = materialised(request.getfixturevalue(layout))
    torch.manual_seed(0)
    sites, latent = select(find_sites(unet), config.target), (PIXELS // 8, PIXELS // 8 + 4)
    stage = Layerwise(Teacher(unet, sites))
    students = {
        s.name: build_student(spec_for(s, config.operator, config.options_of_operator(), latent)) for s in sites
    }
    condition = {key: torch.randn(1, *shape) for key, shape in told.items()}
    lesson = stage.lesson({"latents": torch.randn(1, 4, *latent), "timestep": torch.tensor([400]), "text": condition})
    optimizer = torch.optim.AdamW([p for s in students.values() for p in s.parameters()], config.lr / 10)
    errors = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            found = stage.errors(students, lesson)
        errors.append({site: float(error) for site, error in found.items()})
        optimizer.zero_grad()
        sum(found.values()).backward()
        optimizer.step()
    assert errors[0].keys() == {s.name for s in sites}
    assert all(errors[1][site] < errors[0][site] for site in errors[0]), errors
    del unet, stage
    gc.collect()
