"""A ControlNet for the shipped model: outlines say where shapes lie, the caption says their colours.

    python -m examples.tiny_sd.controlnet --out runs/outlines    # writes runs/outlines/controlnet; resumes

`outlines` makes of a picture what it reads; to draw with, runs/outlines/outlines.png is that of a held-out scene, and
outlines_512.png that of four triangles on a canvas of 512 px, each as large as those of 256 px.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from sd_hyena.options.shipped import SHIPPED_MODEL

from .scenes import Caption, Item, Scene, draw, numbered_scene
from .train import HELD_OUT_SEED, SCHEDULER, TRAINING_SEED, Stage, cached_latents, tokenize

CONTRAST = 40  # of 255, between two neighbours
PLACES = ((-0.27, -0.24, 0.12), (0.22, -0.28, 0.09), (-0.2, 0.25, 0.09), (0.28, 0.22, 0.13))  # x, y, radius
FOUR = Scene(Caption.parse("a red triangle on white"), tuple(Item("red", "triangle", *place) for place in PLACES), 1, 0)


def outlines(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same, white where neighbours differ and black elsewhere."""
    right, down = (np.abs(np.diff(image.astype(int), axis=axis)).max(-1) > CONTRAST for axis in (1, 0))
    edge = np.pad(right, ((0, 0), (0, 1))) | np.pad(right, ((0, 0), (1, 0)))
    edge |= np.pad(down, ((0, 1), (0, 0))) | np.pad(down, ((1, 0), (0, 0)))
    return np.repeat(255 * edge[..., None].astype(np.uint8), 3, axis=-1)


def controlnet_loss(
    modules: nn.ModuleDict,
    generator: np.random.Generator,
    _progress: float,
    *,
    unet: nn.Module,
    latents: Tensor,
    hints: Tensor,
    texts: Tensor,
    scheduler: DDIMScheduler,
    batch_size: int,
) -> Tensor:
    """Velocity prediction of the frozen UNet with the ControlNet's residuals, at timesteps of all kinds alike."""
    chosen = torch.from_numpy(generator.integers(len(latents), size=batch_size))
    t = torch.from_numpy(generator.integers(scheduler.config.num_train_timesteps, size=batch_size))
    x0, noise, text = latents[chosen], torch.randn(batch_size, *latents.shape[1:]), texts[chosen]
    noisy = scheduler.add_noise(x0, noise, t)
    hint = hints[chosen].unsqueeze(1).expand(-1, 3, -1, -1).float()
    with torch.autocast("cpu", torch.bfloat16):
        down, middle = modules["controlnet"](noisy, t, text, hint, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction = unet(noisy, t, text, **residuals).sample
    return F.mse_loss(prediction.float(), scheduler.get_velocity(x0, noise, t))


def main(
    out: str = "runs/outlines", steps: int = 2000, scenes: int = 1000, batch_size: int = 8, lr: float = 1e-3
) -> None:
    """Train it.

    Args:
        out: where checkpoints, latents and the result go
        steps: of training
        scenes: how many are drawn and encoded once
        batch_size: scenes in a step
        lr: the highest learning rate
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(TRAINING_SEED)
    pipe = StableDiffusionPipeline.from_pretrained(str(SHIPPED_MODEL), dtype=torch.float32)
    latents = cached_latents(folder, pipe.vae.eval(), 256, scenes) * pipe.vae.config.scaling_factor
    shown = [numbered_scene(TRAINING_SEED, i) for i in range(scenes)]
    hints = torch.stack([torch.from_numpy(outlines(draw(scene, 256))[..., 0] > 0) for scene in shown])
    with torch.no_grad():
        tokens = tokenize(pipe.tokenizer, [str(scene.caption) for scene in shown])
        texts = torch.cat([pipe.text_encoder(part).last_hidden_state for part in tokens.split(64)])
    pipe.unet.eval().requires_grad_(False)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 48, 64))
    stage = Stage(folder, "controlnet", nn.ModuleDict({"controlnet": controlnet.train()}), steps, lr, decay=0.98)
    given = dict(unet=pipe.unet, latents=latents, hints=hints, texts=texts, batch_size=batch_size)
    trained = stage.run(partial(controlnet_loss, scheduler=DDIMScheduler(**SCHEDULER), **given))
    trained["controlnet"].save_pretrained(folder / "controlnet")
    scene = numbered_scene(HELD_OUT_SEED, 0)
    Image.fromarray(outlines(draw(scene, 256))).save(folder / "outlines.png")
    Image.fromarray(outlines(draw(FOUR, 512))).save(folder / "outlines_512.png")
    print(f"wrote {folder / 'controlnet'} and {folder / 'outlines.png'}: {scene.caption}")


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
