"""A bank: latents that were made once, with their captions; which of them are trained on and which held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_hyena.models.example_prompts import split_prompts
from sd_hyena.students.teacher import Condition


@dataclass(frozen=True)
class Bank:
    """`latents` (N, 4, h, w), scaled as the UNet sees them; `text` {name: (P, ...)}, its last row the empty prompt.

    `prompt` (N,) is the row of each latent's caption. With `timesteps` (N,) the latents are noisy states as they are,
    several of one picture, whose number is in `picture` (N,).
    """

    latents: Tensor
    text: Condition
    prompt: Tensor
    timesteps: Tensor | None = None
    picture: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def split(self) -> tuple[Bank, Bank]:
        """The pictures to train on and the last ones, for validation; a bank of one picture serves as both."""
        picture = torch.arange(len(self)) if self.picture is None else self.picture
        pictures = int(picture.max()) + 1
        n = trained_pictures(pictures)

        def part(rows: Tensor) -> Bank:
            chosen = [None if x is None else x[rows] for x in (self.timesteps, self.picture)]
            return Bank(self.latents[rows], self.text, self.prompt[rows], *chosen)

        return part(picture < n), part(picture >= n if pictures > 1 else picture >= 0)


def trained_pictures(pictures: int) -> int:
    """How many of so many pictures are trained on: three quarters, the first ones."""
    return min(max(1, round(pictures * 0.75)), max(1, pictures - 1))


def captions_of(prompts: list[str], pictures: int) -> list[str]:
    """A caption for each picture; those held out have captions that are not trained on."""
    train, held_out = split_prompts(prompts)
    n = trained_pictures(pictures)
    return [train[i % len(train)] for i in range(n)] + [held_out[i % len(held_out)] for i in range(pictures - n)]
