"""A small bank and the scheduler that noises it."""

import pytest
import torch
from diffusers import DDPMScheduler

from sd_hyena.distil.bank import Bank


@pytest.fixture
def bank():
    torch.manual_seed(0)
    return Bank(torch.randn(5, 4, 6, 8), {"encoder_hidden_states": torch.randn(3, 7, 9)}, torch.tensor([0, 1, 0, 1, 0]))


@pytest.fixture
def scheduler():
    return DDPMScheduler(num_train_timesteps=1000)
