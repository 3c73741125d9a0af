"""Endless streams in which sample i depends on (seed, i) alone: states of the teacher, or the ancestor's tokens.

A state is a latent of a bank, noised to a random timestep, with or without its caption.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sd_hyena.distil.bank import Bank

GUIDANCE_SCALES = 1.0, 10.0
UNCONDITIONAL_SHARE = 0.5  # guidance calls the UNet as often without the caption as with it


class Numbered(IterableDataset):
    """An endless stream: `sample(i)` from i = `start` on, `block` of every `stride` numbers."""

    start, block, stride = 0, 1, 1

    def part(self, start: int, block: int = 1, stride: int = 1) -> Numbered:
        part = copy.copy(self)
        part.start, part.block, part.stride = start, block, stride
        return part

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.sample(i) for first in count(self.start, self.stride) for i in range(first, first + self.block))


class States(Numbered):
    """The endless stream of {"latents" (4, h, w), "timestep" (), "text", "empty", "guidance" ()}.

    `text` is the caption's condition, or in `unconditional` of the samples the empty one, which `empty` always is.
    `guidance` is a scale to combine the two with.
    """

    def __init__(self, bank: Bank, scheduler: Any, seed: int, unconditional: float = UNCONDITIONAL_SHARE):
        self.bank, self.scheduler, self.seed, self.unconditional = bank, scheduler, seed, unconditional

    def sample(self, i: int, timestep: int | None = None) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, i])
        noise_source = torch.Generator().manual_seed(int(rng.integers(2**62)))
        n = int(rng.integers(len(self.bank)))
        last = self.scheduler.config.num_train_timesteps
        t = int(rng.integers(last)) if timestep is None else timestep
        latents = self.bank.latents[n]
        if self.bank.timesteps is None:
            noise = torch.randn(latents.shape, generator=noise_source)
            latents = self.scheduler.add_noise(latents[None], noise[None], torch.tensor([t]))[0]
        else:
            t = int(self.bank.timesteps[n])
        row = -1 if rng.random() < self.unconditional else int(self.bank.prompt[n])
        return {
            "latents": latents,
            "timestep": torch.tensor(t),
            "text": {name: rows[row] for name, rows in self.bank.text.items()},
            "empty": {name: rows[-1] for name, rows in self.bank.text.items()},
            "guidance": torch.tensor(rng.uniform(*GUIDANCE_SCALES), dtype=torch.float32),
        }


class GaussianTokens(Numbered):
    """The ancestor's inputs: standard normal tokens for each site. A baseline; attention is near uniform on them."""

    def __init__(self, shapes: dict[str, tuple[int, int]], seed: int):
        self.shapes, self.seed = shapes, seed

    def sample(self, i: int) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(int(np.random.default_rng([self.seed, i]).integers(2**62)))
        return {name: torch.randn(shape, generator=source) for name, shape in self.shapes.items()}
