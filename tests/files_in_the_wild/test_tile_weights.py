"""--tile_weights: MultiDiffusion as published, and the other ways to count a tile's cells, against a literal loop."""

import math

import pytest
import torch
from diffusers import DDIMScheduler

from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.options.generate_config import GenerateConfig
from tests.gate import sampled
from tests.large.test_tiled_unet import literal_loop, picture

SIDE, OVERLAP = 16, 8
RECTS = [(top, left, SIDE, SIDE) for top in (0, 4) for left in (0, 7)]  # of 20x23 cells


def counted(kind: str, i: int) -> float:
    """How much cell i of a row of a tile counts, from the definitions."""
    inward = min(i, SIDE - 1 - i) + 1  # steps from outside the tile
    return {
        "uniform": 1.0,
        "gaussian": math.exp(-(((i - 7.5) / SIDE) ** 2) / 0.02),
        "ramp": min(1.0, inward / (OVERLAP + 1)),
        "cosine": math.sin(math.pi / 2 * min(1.0, inward / (OVERLAP + 1))) ** 2,
    }[kind]


@pytest.mark.parametrize("kind", sampled(["uniform", "gaussian", "cosine", "ramp"], 2))
def test_the_option_counts_cells_as_a_literal_loop_does(pipe, kind):
    weight = torch.tensor([[max(counted(kind, i) * counted(kind, j), 1e-6) for i in range(SIDE)] for j in range(SIDE)])
    config = GenerateConfig(
        width=184, height=160, tiled_diffusion="multidiffusion", tile_width=SIDE, tile_height=SIDE, overlap=OVERLAP,
        tile_weights=kind, tiled_vae="off",
    )  # fmt: skip
    arrangement = Arrangement.of(config)
    scheduler, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        expected = literal_loop(pipe, DDIMScheduler, "a red circle on blue", "", 184, 160, RECTS, weight, steps=2)
        with arrangement.around(pipe):
            found = picture(pipe, 184, 160, negative_prompt="", steps=2)
    finally:
        pipe.scheduler = scheduler
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())
    assert f"{kind} weights" in str(arrangement)
