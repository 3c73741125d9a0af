"""python -m benchmarks.studies.noise_inversion: how much of a picture img2img keeps, by the noise that it starts from.

Held-out scenes of the shipped model at 256 px, drawn again with their own captions, DDIM, guidance 3. PSNR and SSIM to the
scene as its VAE gives it back, medians over the scenes. `renoise` is renoise_strength; these scenes are smooth nearly
everywhere, so at 1 nearly all noise is fresh.
"""

from __future__ import annotations

from contextlib import nullcontext
from statistics import median

import torch
from diffusers import StableDiffusionImg2ImgPipeline

from benchmarks.harness.record import write
from examples.tiny_sd.scenes import draw, numbered_scene
from examples.tiny_sd.train import HELD_OUT_SEED, to_tensor
from sd_hyena.files.comparison import similarity
from sd_hyena.generate.drawing import decoded
from sd_hyena.large.noise_inversion import noise_inversion
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL

STARTS = {"any noise": None, **{f"inverted, renoise {r:g}": {"renoise_strength": r} for r in (0.0, 0.3, 1.0)}}


@torch.no_grad()
def main(scenes: int = 6, strengths: tuple[float, ...] = (0.4, 0.6), steps: int = 20, back: int = 10) -> None:
    """Draw each scene again from each start.

    Args:
        scenes: how many
        strengths: of img2img
        steps: of the whole schedule
        back: steps of the inversion
    """
    torch.set_num_threads(1)
    pipe = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for strength in strengths:
        for name, options in STARTS.items():
            distances = []
            for i in range(scenes):
                scene = numbered_scene(HELD_OUT_SEED, i)
                image = to_tensor(draw(scene, 256))[None]
                kept = pipe.vae.encode(image).latent_dist.mean * pipe.vae.config.scaling_factor
                given = dict(strength=strength, num_inference_steps=steps, guidance_scale=3.0, output_type="latent")
                given |= dict(image=(image + 1) / 2, generator=torch.Generator().manual_seed(i))
                with nullcontext() if options is None else noise_inversion(pipe, steps=back, **options):
                    latents = pipe(str(scene.caption), **given).images
                distances.append(similarity(decoded(pipe, kept), decoded(pipe, latents)))
            psnr, ssim = (median(one) for one in zip(*distances, strict=True))
            rows.append({"strength": strength, "start": name, "psnr_dB": round(psnr, 1), "ssim": round(ssim, 3)})
            print(rows[-1], flush=True)
    write("noise_inversion", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
