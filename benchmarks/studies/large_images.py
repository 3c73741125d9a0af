"""python -m benchmarks.studies.large_images: what each option for large images costs and saves in one UNet step with guidance.

Each option is arranged as generate.py arranges it. Interleaved, shuffled rounds, each size in a process of its own; medians
of the times and of their ratios to `plain` of the same round, `plain again` is the noise. Memory: the peak above the loaded
model; freed memory goes back to the system at once. Above ONE_ROUND_ABOVE pixels there is one round. Gates: what claims to be
exact is within 1e-4 of plain, all is finite, and after every option the plain step is bit for bit the plain step again.
`distance`: relative rms to plain, of random latents: a description, not a quality.
"""

from __future__ import annotations

import random
import sys
from statistics import median
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.harness.peak import blocks_mapped_one_by_one, in_its_own_process, peak_mib
from benchmarks.harness.record import write
from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import build_student, spec_for
from sd_hyena.students.swap import swapped

SD15 = dict(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain again": {},
    "multidiffusion": dict(tiled_diffusion="multidiffusion"),
    "mixture": dict(tiled_diffusion="mixture"),
    "spot": dict(tiled_diffusion="spot"),
    "hypertile": dict(hypertile=256),
    "bricks": dict(attn_shape="brick"),
    "ff_chunk_size": dict(ff_chunk_size=1024),
    "mixture, hypertile, ff_chunk_size": dict(tiled_diffusion="mixture", hypertile=256, ff_chunk_size=1024),
    "students at level 0": {},
    "students, mixture, ff_chunk_size": dict(tiled_diffusion="mixture", ff_chunk_size=1024),
}
EXACT = ("plain again", "ff_chunk_size")
ONE_ROUND_ABOVE = 1024


class Step:
    """One UNet step of a model at a size, and the ways to arrange it."""

    def __init__(self, model: str, pixels: int, device: str):
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.pipe, self.pixels = load_pipeline(SHIPPED_MODEL, torch.device(device), dtype), pixels
        if model == "sd15":
            self.pipe.unet = UNet2DConditionModel(**SD15).to(device, dtype).eval()
        sites = select(find_sites(self.pipe.unet), "level0")
        train, cells = TrainConfig(), (pixels // 8, pixels // 8)
        specs = [spec_for(site, train.operator, train.options_of_operator(), cells) for site in sites]
        self.students = {spec.site: build_student(spec).to(device, dtype).eval() for spec in specs}
        width = self.pipe.unet.config.cross_attention_dim
        self.given = [
            torch.randn(2, 4, *cells).to(device, dtype),
            torch.tensor(500, device=device),
            torch.randn(2, 77, width).to(device, dtype),
        ]
        self.pipe.unet(self.given[0][..., :32, :32], *self.given[1:])  # warm

    def __call__(self, name: str) -> tuple[Tensor, float, float]:
        """The prediction, seconds and MiB."""
        options = OPTIONS[name]
        if "tiled_diffusion" in options:  # tiles of half the side, overlapping by half of that
            options = options | dict(tile_width=self.pixels // 16, tile_height=self.pixels // 16)
        arrangement = Arrangement.of(GenerateConfig(width=self.pixels, allow_huge=True, tiled_vae="off", **options))
        students = self.students if "students" in name else {}
        with swapped(self.pipe.unet, students), arrangement.around(self.pipe):
            return peak_mib(lambda: self.pipe.unet(*self.given).sample)


def measure(model: str, pixels: int, device: str, rounds: int, answer) -> None:
    """Seconds and MiB of every option and round, and its distance to plain; after the gates."""
    step, order = Step(model, pixels, device), random.Random(0)
    plain = step("plain")[0]
    seconds, mib, distance = {name: [] for name in OPTIONS}, {name: [] for name in OPTIONS}, {}
    for _ in range(rounds):
        for name in order.sample(list(OPTIONS), len(OPTIONS)):
            result, *cost = step(name)
            seconds[name].append(cost[0])
            mib[name].append(cost[1])
            distance[name] = ((result - plain).square().mean() / plain.square().mean()).sqrt().item()
            if not result.isfinite().all() or (name in EXACT and distance[name] > 1e-4):
                sys.exit(f"{name} at {pixels} px is not what plain gives; nothing is reported")
    if not torch.equal(step("plain")[0], plain):
        sys.exit("the options left something behind; nothing is reported")
    answer.put((seconds, mib, distance))


def main(
    model: Literal["tiny_sd", "sd15"] = "tiny_sd",
    sizes: tuple[int, ...] = (512, 1024, 2048),
    rounds: int = 3,
    device: str = "cpu",
) -> None:
    """Measure every option at each size; what is done is written after each.

    Args:
        model: the shipped one, or Stable Diffusion 1.5's layout with random weights
        sizes: sides of square images, pixels
        rounds: of timing
        device: cpu or cuda
    """
    rows = []
    for pixels in sizes:
        with blocks_mapped_one_by_one():
            count = rounds if pixels <= ONE_ROUND_ABOVE else 1
            seconds, mib, distance = in_its_own_process(measure, model, pixels, device, count)
        for name in OPTIONS:
            ratios = [a / b for a, b in zip(seconds[name], seconds["plain"], strict=True)]
            row = {"model": model, "pixels": pixels, "option": name, "s": f"{median(seconds[name]):.3g}"}
            row |= {"of_plain": round(median(ratios), 2), "distance": f"{distance[name]:.2g}"}
            rows.append(row | {"MiB": round(max(mib[name]))})
        write(f"large_images_{model}", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
