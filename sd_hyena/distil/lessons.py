"""What students are trained on: batches of states, which the teacher turns into lessons."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from sd_hyena.distil.bank import Bank
from sd_hyena.distil.stages import Layerwise, Stage
from sd_hyena.distil.streams import UNCONDITIONAL_SHARE, GaussianTokens, Numbered, States
from sd_hyena.options.train_config import TrainConfig

VALIDATION_SIZE = 16  # states
VALIDATION_SEED = 2**33  # outside what a user can choose


class Lessons(L.LightningDataModule):
    """Batches of a stage's lessons, given on the device where the students are; in validation of {site: Activation}."""

    def __init__(
        self, stage: Stage, scheduler: Any, bank: Bank, config: TrainConfig, validation_size: int = VALIDATION_SIZE
    ):
        super().__init__()
        self.stage, self.teacher, self.scheduler, self.config = stage, stage.teacher, scheduler, config
        self.validation_size = validation_size
        self.micro_batch_size = config.micro_batch_size or config.batch_size // config.processes
        self.training_bank, self.validation_bank = bank.split()
        self.latent_size = tuple(bank.latents.shape[-2:])

    @property
    def accumulate(self) -> int:
        """Micro-batches in a step, on each device."""
        return self.config.batch_size // self.config.processes // self.micro_batch_size

    def halve(self) -> bool:
        """Halve the micro-batch to a divisor of the batch; False if it is 1 already."""
        share = self.config.batch_size // self.config.processes
        smaller = [n for n in range(1, self.micro_batch_size // 2 + 1) if share % n == 0]
        if smaller:
            self.micro_batch_size = smaller[-1]
        return bool(smaller)

    def setup(self, stage: str) -> None:
        self.teacher.to(self.trainer.strategy.root_device)

    def stream(self) -> Numbered:
        """The training samples."""
        if self.config.data != "noise":
            unconditional = 0.0 if self.config.stage == "end_to_end" else UNCONDITIONAL_SHARE
            return States(self.training_bank, self.scheduler, self.config.seed, unconditional)
        shapes = {}
        for site in self.teacher.sites:
            h, w = site.size(*self.latent_size)
            shapes[site.name] = (h * w, site.channels)
        return GaussianTokens(shapes, self.config.seed)

    def train_dataloader(self) -> DataLoader:
        """The ranks take micro-batches in turn, so a step consists of the same ones whoever computes them."""
        size = self.micro_batch_size
        # global_step is already restored here, so a resumed run goes on with the sample after the last one used.
        start = self.trainer.global_step * self.config.batch_size + self.trainer.global_rank * size
        return DataLoader(self.stream().part(start, size, self.trainer.world_size * size), batch_size=size)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out(), batch_size=min(self.micro_batch_size, self.validation_size))

    def held_out_batch(self, number: int) -> dict[str, Tensor]:
        """The states of one batch of `val_dataloader`."""
        n, size = self.validation_size, min(self.micro_batch_size, self.validation_size)
        return default_collate(self.held_out(range(number * size, min((number + 1) * size, n))))

    def held_out(self, rows: range | None = None) -> list[dict[str, Tensor]]:
        """Held-out states, at timesteps spread evenly unless they have their own; real ones whatever the data."""
        states = States(self.validation_bank, self.scheduler, VALIDATION_SEED)
        n, last = self.validation_size, self.scheduler.config.num_train_timesteps
        return [states.sample(i, timestep=int((i + 0.5) * last / n)) for i in (range(n) if rows is None else rows)]

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> Any:
        if "latents" not in batch:  # tokens of the ancestor's kind
            timestep = torch.zeros(self.micro_batch_size, dtype=torch.long)
            return self.teacher.answers(batch, self.latent_size, timestep)
        if self.trainer is not None and not self.trainer.training:
            return self.teacher.activations(batch["latents"], batch["timestep"], batch["text"])
        if self.trainer is None or isinstance(self.stage, Layerwise):
            return self.stage.lesson(batch)
        with self.trainer.precision_plugin.forward_context():  # the students' UNet will run in it: no rounding to learn
            return self.stage.lesson(batch)
