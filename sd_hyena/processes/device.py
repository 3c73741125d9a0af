"""Which device a run computes on, and in which precision."""

from __future__ import annotations

import torch

from sd_hyena.errors import BadInput
from sd_hyena.processes.nvidia import say_unused_gpu


def pick_device(name: str | torch.device) -> torch.device:
    """`auto` is the GPU if there is one; one that torch cannot use is said. Raises BadInput for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        say_unused_gpu()
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0][:120]}); try auto or cpu"
        ) from None
    return device


def pick_dtype(name: str | torch.dtype, device: torch.device) -> torch.dtype:
    """`auto` is half precision on a GPU and float32 elsewhere."""
    if name == "auto":
        name = "float16" if device.type == "cuda" else "float32"
    return getattr(torch, name) if isinstance(name, str) else name
