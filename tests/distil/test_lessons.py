import torch

from sd_hyena.distil.bank import Bank
from sd_hyena.distil.lessons import Lessons
from sd_hyena.distil.stages import Layerwise
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.teacher import Teacher
from tests.conftest import IN01


def config(**options):
    return TrainConfig(**{**dict(width=64, batch_size=4, seed=0), **options})


def test_the_datamodule_turns_states_into_activations_of_every_site(unet, bank, scheduler):
    sites = select(find_sites(unet), "IN01,M00")
    text = Bank(bank.latents, {"encoder_hidden_states": torch.randn(3, 32, 96)}, bank.prompt)
    data = Lessons(Layerwise(Teacher(unet, sites)), scheduler, text, config(), validation_size=6)
    batches = list(data.val_dataloader())
    timesteps = torch.cat([batch["timestep"] for batch in batches])
    assert timesteps.tolist() == [83, 250, 416, 583, 750, 916]
    activations = data.on_after_batch_transfer(batches[0], 0)
    assert list(activations) == [site.name for site in sites]
    assert activations[IN01].input.shape == (4, 48, 32) and activations[IN01].size == (6, 8)
    assert torch.equal(activations[IN01].timestep, timesteps[:4])


def test_halving_keeps_a_divisor_of_the_batch(unet, bank, scheduler):
    data = Lessons(Layerwise(Teacher(unet, find_sites(unet))), scheduler, bank, config(batch_size=15))
    sizes = [data.micro_batch_size]
    while data.halve():
        sizes.append(data.micro_batch_size)
    assert sizes == [15, 5, 1] and data.accumulate == 15
