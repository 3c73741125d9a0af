"""What each site of a UNet costs, as attention and as a student, at the size of a training."""

from __future__ import annotations

import math

from torch import nn

from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops
from sd_hyena.distil.selection import Candidate
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.student import StudentSpec, spec_for


def counted(unet: nn.Module, config: TrainConfig) -> tuple[int, list[tuple[Candidate, StudentSpec]]]:
    """Operations of the UNet, and its sites as candidates that no pilot has tried yet, with their students' specs."""
    latent_size = (config.height // 8, config.width // 8)
    found = []
    for site in find_sites(unet):
        size = site.size(*latent_size)
        spec = spec_for(site, config.operator, config.options_of_operator(), latent_size)
        costs = attention_flops(site, size), folded_flops(spec, size)
        found.append((Candidate(site.short, *costs, error=math.inf), spec))
    return unet_flops(unet, latent_size), found
