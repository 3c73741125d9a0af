"""Distillation: students learn what their sites would have answered. Holds students and nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sd_hyena.distil.stages import Layerwise, Stage, prediction_error
from sd_hyena.processes.memory import peak_gib
from sd_hyena.students.losses import by_timestep, cosine, error_and_spread
from sd_hyena.students.teacher import Activation

POSITION_LR = 1e-5  # of the stored positions of 1-D filters, as in safari
PATIENCE = 10  # non-finite steps in a row before the run stops


class NonFinite(RuntimeError):
    """Gradients stayed NaN or infinite; the weights are those of the last good step."""


class Distillation(L.LightningModule):
    """Trains `students` (by site path) on the lessons of a stage; the loss is the sum of its errors.

    `lr_projections` is the learning rate of the projections' change, 0 a tenth of `lr`. `schedule` is what follows a linear
    warm-up: "constant", or "cosine" to zero at `n_steps`. Stored positions of 1-D filters hardly move, as in safari. A
    step whose loss or gradient is not finite leaves the weights alone.
    """

    def __init__(
        self,
        students: Mapping[str, nn.Module],
        stage: Stage,
        *,
        lr: float,
        n_steps: int,
        schedule: str = "constant",
        warmup_steps: int = 0,
        lr_projections: float = 0.0,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.stage = stage
        self.lr, self.n_steps, self.schedule, self.warmup_steps = lr, n_steps, schedule, warmup_steps
        self.weight_decay, self.lr_projections = weight_decay, lr_projections or lr / 10
        self.key = {site: site.replace(".", "_") for site in students}  # ModuleDict allows no dots
        self.students = nn.ModuleDict({self.key[site]: student for site, student in students.items()})
        self.bad_steps = 0
        self.sums: dict[str, Tensor] = {}  # of this step's losses so far
        self.samples = 0
        self.seen: dict[str, list[Tensor]] = {}  # of this validation: rows of error, spread, cosine, timestep by site
        self.predicted: list[Tensor] = []  # of this validation: error and spread of the prediction

    def by_site(self) -> dict[str, nn.Module]:
        return {site: self.students[key] for site, key in self.key.items()}

    def forward(self, batch: Mapping[str, Activation]) -> dict[str, Tensor]:
        """Each student's answer to its site's input."""
        return {
            site: self.students[self.key[site]](activation.input, activation.projections, activation.size)
            for site, activation in batch.items()
        }

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        errors = self.stage.errors(self.by_site(), batch)
        for name, error in errors.items():
            self.sums[name] = self.sums.get(name, 0.0) + error.detach()
        total = sum(errors.values())
        self.log("loss", total, prog_bar=True, batch_size=1, logger=False)
        return total

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
        if norm.isfinite():
            self.bad_steps = 0
            self.log("train/gradient_norm", norm)
            return
        optimizer.zero_grad()  # AdamW passes over parameters without a gradient
        self.bad_steps += 1
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of float16: it lowers its scale first
        if self.bad_steps >= PATIENCE * (1 if scaler is None else 3):
            raise NonFinite(
                f"the gradient was not finite for {self.bad_steps} steps in a row; the weights are those of the last good "
                f"step. Lower --lr (now {self.lr:g}), or use --precision 32-true"
            )

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        if not self.sums:
            self._clock, self._before = time.perf_counter(), self.global_step

    def on_train_batch_end(self, outputs, batch: Any, batch_idx: int) -> None:
        self.samples += self.trainer.datamodule.micro_batch_size
        if self.global_step == self._before:
            return  # in the middle of an accumulation
        self.log("step", float(self.global_step), batch_size=1)  # the loggers' abscissa
        for name, total in self.sums.items():
            loss = total / self.trainer.accumulate_grad_batches
            self.log(f"train/loss/{self._short(name)}", loss, batch_size=1, sync_dist=True)
        rate = self.samples * self.trainer.world_size / (time.perf_counter() - self._clock)
        self.log("train/samples_per_second", rate)
        self.log("train/lr", self.optimizers().param_groups[0]["lr"])
        self.log("train/memory_GiB", peak_gib(self.device))
        self.sums, self.samples = {}, 0

    def validation_step(self, batch: Mapping[str, Activation], batch_idx: int) -> None:
        for site, answer in self(batch).items():
            error, spread = error_and_spread(answer, batch[site].target)
            near = cosine(answer, batch[site].target).expand_as(error)
            rows = torch.stack([error, spread, near, batch[site].timestep.to(error)])
            self.seen.setdefault(site, []).append(rows)

        if not isinstance(self.stage, Layerwise):  # here and not at the end, where averaged weights are swapped out
            data = self.trainer.datamodule
            states = data.transfer_batch_to_device(data.held_out_batch(batch_idx), self.device, 0)
            self.predicted.append(prediction_error(self.stage.teacher, self.by_site(), states))

    def on_validation_epoch_start(self) -> None:
        self.seen, self.predicted = {}, []

    def on_train_start(self) -> None:
        self.sums, self.samples = {}, 0

    def on_validation_epoch_end(self) -> None:
        self.log("step", float(self.global_step))
        for site, parts in self.seen.items():
            error, spread, near, timestep = torch.cat(parts, dim=1)
            short = self._short(site)
            relative = error.sum() / spread.sum()
            self.log(f"val/relative_mse/{short}", relative, prog_bar=len(self.students) == 1)
            self.log(f"val/log10_relative_mse/{short}", relative.clamp_min(1e-12).log10())
            self.log(f"val/cosine/{short}", near.mean())
            for name, share in by_timestep(error, spread, timestep).items():
                self.log(f"val/relative_mse_{name}/{short}", share)
        if self.predicted:
            error, spread = torch.stack(self.predicted).sum(dim=0)
            self.log("val/prediction", error / spread)

    def configure_optimizers(self):
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            lr = self.lr_projections if ".change" in name else self.lr
            groups.setdefault(min(POSITION_LR, lr) if name.endswith("pos_emb.z") else lr, []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": parameters, "lr": lr} for lr, parameters in groups.items()], weight_decay=self.weight_decay
        )

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
            if self.schedule == "constant":
                return warm
            done = min(max(step - self.warmup_steps, 0) / max(self.n_steps - self.warmup_steps, 1), 1.0)
            return warm * (1 + math.cos(math.pi * done)) / 2

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Count the micro-batches anew: a run may go on with another number of them in a step."""
        loop = checkpoint["loops"]["fit_loop"]
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        counts = dict.fromkeys(("ready", "started", "processed", "completed"), done)
        for part in ("current", "total"):
            loop["epoch_loop.batch_progress"][part] = dict(counts)
        unread = loop["epoch_loop.val_loop.batch_progress"]["current"]  # a validation that memory ended begins anew
        unread.update(dict.fromkeys(unread, 0))

    def _short(self, name: str) -> str:
        return self.students[self.key[name]].spec.short if name in self.key else name
