"""python -m examples.tiny_sd.measure: the numbers and pictures of the model card, on captions and seeds never trained on.

Does the VAE keep the scenes, does the model draw its captions, and does its self-attention matter: the five level-0 sites
silenced, and replaced by trained pointwise MLPs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sd_hyena.distil.training import train
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.losses import relative_mse
from sd_hyena.students.swap import swapped

from .checker import is_right
from .scenes import Scene, draw, numbered_scene
from .train import HELD_OUT_SEED, SCHEDULER, to_tensor

HERE = Path(__file__).parent
GUIDANCE, STEPS = 3.0, 25


class Silent(nn.Module):
    """A student that answers nothing."""

    def forward(self, x: Tensor, projections, size) -> Tensor:
        return torch.zeros_like(x)


def held_out(count: int, wanted=lambda scene: True) -> list[Scene]:
    """The first `count` held-out scenes that are `wanted`."""
    found, i = [], 0
    while len(found) < count:
        scene = numbered_scene(HELD_OUT_SEED, i)
        found += [scene] if wanted(scene) else []
        i += 1
    return found


def is_single(scene: Scene) -> bool:
    return len(scene.items) == 1


@torch.no_grad()
def vae_quality(vae, scenes: list[Scene]) -> tuple[float, float]:
    """Mean PSNR in dB of the reconstructions, and the share that is still right."""
    psnr, right = [], []
    for scene in scenes:
        x = to_tensor(draw(scene))[None]
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(-10 * ((y - x) / 2).square().mean().log10().item())
        right.append(is_right(((y[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), scene.caption))
    return float(np.mean(psnr)), float(np.mean(right))


def images(pipe, scenes: list[Scene], guidance: float = GUIDANCE, size: int = 256, batch: int = 8) -> list[np.ndarray]:
    """An image of each caption as uint8; image i has seed i."""
    drawn = []
    for start in tqdm(range(0, len(scenes), batch), disable=None):
        rows = range(start, min(start + batch, len(scenes)))
        result = pipe(
            [str(scenes[i].caption) for i in rows],
            width=size,
            height=size,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(i) for i in rows],
            output_type="np",
        )
        drawn += [(image * 255).round().astype(np.uint8) for image in result.images]
    return drawn


@torch.no_grad()
def predictions(pipe, scenes: list[Scene]) -> Tensor:
    """What the UNet returns for noised held-out latents at evenly spread timesteps, with their captions."""
    from diffusers import DDIMScheduler

    noiser, result = DDIMScheduler(**SCHEDULER), []
    for i, scene in enumerate(scenes):
        x0 = pipe.vae.encode(to_tensor(draw(scene))[None]).latent_dist.mean * pipe.vae.config.scaling_factor
        t = torch.tensor([int((i + 0.5) * 1000 / len(scenes))])
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(i))
        text = pipe.encode_prompt(str(scene.caption), pipe.device, 1, False)[0]
        result.append(pipe.unet(noiser.add_noise(x0, noise, t), t, text).sample)
    return torch.cat(result)


def main(model: str = str(SHIPPED_MODEL), captions: int = 100, ablated: int = 32, n_steps: int = 300) -> None:
    """Measure the model and write samples.png and measured.json beside this file.

    Args:
        model: a diffusers folder
        captions: how many single-object captions, and how many of all kinds
        ablated: how many of all kinds for the ablation
        n_steps: training steps of the pointwise MLPs
    """
    torch.manual_seed(0)
    pipe = load_pipeline(Path(model), torch.device("cpu"), torch.float32)
    level0 = [site.name for site in select(find_sites(pipe.unet), "level0")]
    everything, single = held_out(captions), held_out(captions, is_single)
    measured: dict[str, float] = {}
    measured["vae_psnr"], measured["vae_right"] = vae_quality(pipe.vae, everything)
    drawn = images(pipe, single)
    measured["single_right"] = float(np.mean([is_right(x, s.caption) for x, s in zip(drawn, single, strict=True)]))
    drawn = images(pipe, everything)
    right = [is_right(x, s.caption) for x, s in zip(drawn, everything, strict=True)]
    measured["all_right"] = float(np.mean(right))

    outcome = train(
        TrainConfig(
            teacher_model=model, target="level0", operator="pointwise", width=256, batch_size=8, n_steps=n_steps,
            validate_every_n_steps=0, save_every_n_steps=0, out_dir="out/measure", log_dir="logs/measure", seed=0,
        )
    )  # fmt: skip
    silenced = {name: Silent() for name in level0}
    pointwise = load_students(outcome.exported, pipe.unet).students
    scenes, truth, rows = everything[:ablated], predictions(pipe, everything[:ablated]), [drawn[:8]]
    for name, students in (("silenced", silenced), ("pointwise", pointwise)):
        with swapped(pipe.unet, students):
            measured[f"{name}_prediction_error"] = float(
                relative_mse(*(p.flatten(1)[None] for p in (predictions(pipe, scenes), truth)))
            )
            others = images(pipe, scenes)
        rows.append(others[:8])
        mse = [np.square(a.astype(float) - b).mean() for a, b in zip(drawn, others, strict=False)]
        measured[f"{name}_psnr"] = float(np.median([10 * np.log10(255**2 / max(e, 1e-9)) for e in mse]))
        still = [is_right(x, s.caption) for x, s in zip(others, scenes, strict=True)]
        measured[f"{name}_right"] = float(np.mean(still))
    measured["teacher_right_of_the_same"] = float(np.mean(right[:ablated]))
    measured |= {
        f"error/{k.split('/')[-1]}": v for k, v in outcome.metrics.items() if k.startswith("val/relative_mse/")
    }
    (HERE / "measured.json").write_text(json.dumps({k: round(v, 4) for k, v in measured.items()}, indent=1) + "\n")
    grid = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    Image.fromarray(grid).resize((grid.shape[1] // 2, grid.shape[0] // 2), Image.Resampling.LANCZOS).save(
        HERE / "samples.png"
    )
    for name, value in measured.items():
        print(f"{name:<32}{value:.4f}")
    print("\n".join(f"{i}: {scene.caption}" for i, scene in enumerate(everything[:8])))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
