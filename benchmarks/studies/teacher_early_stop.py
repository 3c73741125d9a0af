"""python -m benchmarks.studies.teacher_early_stop: what a teacher forward costs when it stops after the last selected site.

Gate: the activations of the short forward equal those of the whole one, bit for bit. Interleaved, medians.
"""

from __future__ import annotations

import sys

import torch
from diffusers import UNet2DConditionModel

from benchmarks.harness.record import write
from sd_hyena.cost.timing import interleaved_medians
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import find_sites, select
from sd_hyena.students.teacher import Teacher


def rows_of(name: str, unet, latents: int, text: tuple[int, int], rounds: int) -> list[dict]:
    sites, rows = find_sites(unet), []
    given = torch.randn(1, 4, latents, latents), torch.tensor([500]), {"encoder_hidden_states": torch.randn(1, *text)}
    for target in ("IN01", "IN01,IN02", "M00", "OUT11"):
        early, whole = (Teacher(unet, select(sites, target), whole=w) for w in (False, True))
        a, b = early.activations(*given), whole.activations(*given)
        if not all(torch.equal(a[site].target, b[site].target) for site in b):
            sys.exit(f"{name} {target}: the early stop changes the activations; nothing was timed")
        calls = (lambda: early.activations(*given), lambda: whole.activations(*given))  # noqa: B023
        short, full = interleaved_medians(calls, rounds, torch.device("cpu"))
        times = {"early_ms": round(short * 1e3, 1), "whole_ms": round(full * 1e3, 1), "ratio": round(full / short, 1)}
        rows.append({"model": name, "pixels": latents * 8, "target": target, **times})
    return rows


def main(quick: bool = False) -> None:
    """Time it on the shipped model, and on SD 1.5's layout with random weights.

    Args:
        quick: the shipped model only
    """
    tiny = UNet2DConditionModel.from_pretrained(SHIPPED_MODEL / "unet").float()
    rows = rows_of("tiny_sd", tiny, 64, (32, 96), rounds=7)
    if not quick:
        torch.manual_seed(0)
        sd15 = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        rows += rows_of("SD 1.5 layout", sd15, 64, (77, 768), rounds=3)
    write("teacher_early_stop", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
