"""Pictures in TensorBoard while a student learns: what each site sees and answers, and whole images."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from sd_hyena.models.latents import decoded, vae_for
from sd_hyena.students.swap import swapped
from sd_hyena.students.teacher import Activation

LARGEST_ON_CPU = 512 * 512  # pixels of an image preview without a GPU


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


class Previews(L.Callback):
    """Adds both kinds of pictures at every validation. Before the averaging callback it sees averaged weights."""

    def __init__(self, pipe: Any, prompt: str, width: int, height: int, steps: int = 12, cfg_scale: float = 5.0):
        self.pipe, self.prompt, self.width, self.height = pipe, prompt, width, height
        self.steps, self.cfg_scale = steps, cfg_scale
        self.teacher_image: Tensor | None = None
        self.psnr: float | None = None

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == 0:
            middle = len(next(iter(batch.values())).timestep) // 2
            for site, answer in module(batch).items():
                short = module.by_site()[site].spec.short
                picture = site_picture(batch[site], answer, middle)
                self._add(trainer, f"site {short}: input | teacher | student | difference", picture)

    def on_validation_epoch_end(self, trainer, module) -> None:
        if module.device.type == "cpu" and self.width * self.height > LARGEST_ON_CPU:
            return
        if self.teacher_image is None:
            self.teacher_image = self._generate()
        with swapped(self.pipe.unet, module.by_site()):
            student = self._generate()
        difference = (student - self.teacher_image).abs()
        self.psnr = float(-10 * difference.square().mean().clamp_min(1e-12).log10())
        module.log("val/image_psnr", self.psnr, batch_size=1)
        self._add(
            trainer, "image: teacher | student | difference", torch.cat([self.teacher_image, student, difference], -1)
        )

    def _generate(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        with vae_for(self.pipe, max(self.width, self.height)):
            latents = self.pipe(
                self.prompt,
                width=self.width,
                height=self.height,
                num_inference_steps=self.steps,
                guidance_scale=self.cfg_scale,
                generator=generator,
                output_type="latent",
            ).images
            pixels = decoded(self.pipe, latents)
        return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255

    def _add(self, trainer, name: str, picture: Tensor) -> None:
        for logger in trainer.loggers:
            if hasattr(logger.experiment, "add_image"):
                logger.experiment.add_image(name, picture, trainer.global_step)
