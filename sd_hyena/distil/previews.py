"""Pictures in TensorBoard while a student learns: what each site sees and answers, and whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_hyena.models.latents import decoded, vae_for
from sd_hyena.options.own_defaults import own_defaults
from sd_hyena.processes.memory import is_out_of_memory
from sd_hyena.processes.progress import work
from sd_hyena.processes.ranks import say
from sd_hyena.students.swap import swapped
from sd_hyena.students.teacher import Activation

LARGEST_ON_CPU = 512 * 512  # pixels of an image preview without a GPU
PICTURES = 4  # at least


def site_picture(activation: Activation, answer: Tensor, sample: int = 0, side: int = 192) -> Tensor:
    """Input | teacher | student | difference of one sample as an image (3, side, 4 side).

    Three principal components of the teacher's channels are its colours; the student is shown in the same ones. The
    difference is the error's length per token, white at the teacher's own root mean square.
    """
    h, w = activation.size
    x, y, y_ = (t[sample].float() for t in (activation.input, activation.target, answer))
    maps = [_coloured(x, x), _coloured(y, y), _coloured(y_, y)]
    error = (y_ - y).norm(dim=-1) / (y - y.mean(0)).norm(dim=-1).square().mean().sqrt().clamp_min(1e-12)
    maps.append(error.clamp(0, 1)[:, None].expand(-1, 3))
    tall = [m.reshape(1, h, w, 3).permute(0, 3, 1, 2) for m in maps]
    return torch.cat([F.interpolate(m, (side, max(1, side * w // h))) for m in tall], dim=-1)[0].cpu()


def _coloured(tokens: Tensor, of: Tensor) -> Tensor:
    """Tokens (L, D) in the first three principal components of `of`, two deviations to each side fill 0 ... 1."""
    mean = of.mean(0)
    _, scale, axes = torch.linalg.svd((of - mean).cpu(), full_matrices=False)
    n = min(3, len(scale))
    deviation = scale[:n] / max(len(of) - 1, 1) ** 0.5
    shown = (tokens - mean).cpu() @ axes[:n].T / (4 * deviation.clamp_min(1e-12)) + 0.5
    return F.pad(shown.clamp(0, 1), (0, 3 - n), value=0.5)


def draws_previews(device: torch.device, width: int, height: int) -> bool:
    """Whether pictures of this size are drawn while a student learns."""
    return device.type != "cpu" or width * height <= LARGEST_ON_CPU


def drawn_with(model: str) -> tuple[int, float]:
    """Steps and guidance of a preview: the model's own."""
    own = own_defaults(model)
    return own.steps, own.cfg_scale


class Previews(L.Callback):
    """Adds both kinds of pictures at every validation. Before the averaging callback it sees averaged weights.

    At least four pictures, number i of prompt i (from the first again) and seed i, in the steps and with the guidance of
    the `model` that `pipe` was loaded from ("" is the one that ships); their mean PSNR is logged.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], width: int, height: int, model: str = ""):
        self.pipe, self.width, self.height = pipe, width, height
        self.steps, self.cfg_scale = drawn_with(model)
        self.prompts = [prompts[i % len(prompts)] for i in range(max(PICTURES, len(prompts)))]
        self.teachers: list[Tensor] | None = None
        self.psnr: float | None = None

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            middle = len(next(iter(batch.values())).timestep) // 2
            for site, answer in module(batch).items():
                short = module.by_site()[site].spec.short
                picture = site_picture(batch[site], answer, middle)
                self._add(trainer, f"site {short}: input | teacher | student | difference", picture)

    def on_validation_epoch_end(self, trainer, module) -> None:
        if not draws_previews(module.device, self.width, self.height):
            return
        try:
            if self.teachers is None:
                self.teachers = self._drawn("the teacher's pictures")
            with swapped(self.pipe.unet, module.by_site()):
                students = self._drawn("the students' pictures")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            say("out of memory: no pictures at this validation")
            return
        differences = [(ours - theirs).abs() for ours, theirs in zip(students, self.teachers, strict=True)]
        each = [-10 * d.square().mean().clamp_min(1e-12).log10() for d in differences]
        self.psnr = float(torch.stack(each).mean())
        module.log("val/image_psnr", self.psnr, batch_size=1)
        rows = [torch.cat(row, -1) for row in zip(self.teachers, students, differences, strict=True)]
        self._add(trainer, "image: teacher | student | difference", _small(torch.cat(rows, -2)))

    def _drawn(self, what: str) -> list[Tensor]:
        pictures, steps = [], self.steps + 1  # the VAE counts as one
        with work(what, len(self.prompts)) as shown, vae_for(self.pipe, max(self.width, self.height)):
            for i, prompt in enumerate(self.prompts):

                def after(_pipe, step, _timestep, tensors, i=i):
                    shown.to(i + (step + 1) / steps)
                    return tensors

                latents = self.pipe(
                    prompt,
                    width=self.width,
                    height=self.height,
                    num_inference_steps=self.steps,
                    guidance_scale=self.cfg_scale,
                    generator=torch.Generator().manual_seed(i),
                    callback_on_step_end=after,
                    output_type="latent",
                ).images
                pixels = decoded(self.pipe, latents)
                pictures.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
        return pictures

    def _add(self, trainer, name: str, picture: Tensor) -> None:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(name, picture, trainer.global_step)


def _small(picture: Tensor) -> Tensor:
    """(3, H, W) no wider than three pictures of 512 pixels."""
    shrink = 3 * 512 / picture.shape[-1]
    return picture if shrink >= 1 else F.interpolate(picture[None], scale_factor=shrink, mode="area")[0]
