"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from sd_hyena.errors import BadInput
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes import ranks
from sd_hyena.processes.device import pick_device, pick_dtype


def own_device(config: TrainConfig) -> torch.device:
    """The device of this process. Raises BadInput if there are too few."""
    device = pick_device(config.device)
    if config.devices > 1 and device.type == "cuda":
        if config.devices > torch.cuda.device_count():
            raise BadInput(f"devices={config.devices}, but this machine has {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", ranks.local_rank())
    if config.processes > 1 and device.type not in ("cpu", "cuda"):
        raise BadInput(f"devices={config.devices} needs GPUs or --device cpu, not {device}")
    return device


def precision_of(config: TrainConfig, device: torch.device) -> str:
    if config.precision != "auto":
        return config.precision
    if device.type != "cuda":
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def teacher_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Gradients pass through the teacher's dtype; in float16 they vanish unless the loss is scaled. Raises BadInput."""
    precision = precision_of(config, device)
    if config.dtype == "auto" and precision == "bf16-mixed":
        return torch.bfloat16
    dtype = pick_dtype(config.dtype, device)
    if dtype == torch.float16 and precision != "16-mixed":
        raise BadInput(
            f"dtype=float16 with precision={precision}: gradients would vanish in float16; "
            f"use --dtype bfloat16 or float32, or --precision 16-mixed"
        )
    return dtype
