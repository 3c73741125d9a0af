"""What is going to be drawn, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sd_hyena.generate.alternatives import Alternative
from sd_hyena.options.generate_config import GenerateConfig

LONGEST = 60  # characters of a prompt


def summary(
    config: GenerateConfig, device: torch.device, dtype: torch.dtype, alternatives: Sequence[Alternative], pictures: int
) -> str:
    """*a red circle on white · 256x256 · 25 steps of ddim · guidance 3 · seed 7 · float32 on cpu · level0 (5 students)*

    of a config without anything left open; `pictures` of each alternative.
    """
    prompt = " ".join((config.prompt or "").split())
    seeds = f"seed {config.seed}" if pictures == 1 else f"{pictures} pictures, seeds from {config.seed}"
    parts = [
        (prompt if len(prompt) <= LONGEST else f"{prompt[:LONGEST]}...") or "no prompt",
        f"{config.width}x{config.height}",
        f"{config.steps} steps of {config.scheduler}{' karras' * config.karras}",
        f"guidance {config.cfg_scale:g}" if config.cfg_scale else "no guidance",
        seeds,
        f"{str(dtype).removeprefix('torch.')} on {device}",
    ]
    if config.init_image:
        parts.insert(1, f"from {Path(config.init_image).name} at strength {config.strength:g}")
    parts += [_told(one) for one in alternatives if one.entry]
    return " · ".join(parts)


def _told(alternative: Alternative) -> str:
    count = len(alternative.students)
    entry = "+".join(dict.fromkeys(alternative.files.values())) or alternative.entry
    return f"{entry} ({count} student{'s' * (count != 1)})"
