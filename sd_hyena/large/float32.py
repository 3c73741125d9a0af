"""Modules that compute in float32 for a while, or where their own precision does not do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn


@contextmanager
def in_float32(*parts: nn.Module | None) -> Iterator[None]:
    """Within the block these modules' weights are float32; afterwards they are the very ones they were."""
    tensors = [t for part in parts if part is not None for t in chain(part.parameters(), part.buffers())]
    before = [t.data for t in tensors]
    try:
        for t in tensors:
            t.data = t.data.float()
        yield
    finally:
        for t, data in zip(tensors, before, strict=True):
            t.data = data


def finite(x: Tensor, vae: nn.Module, call: Callable[[Tensor], Tensor], *parts: str) -> Tensor:
    """What a half of the VAE, these `parts`, makes of x, in float32: computed so again if its own precision overflows."""
    y = call(x.to(vae.dtype))
    if not y.isfinite().all():
        with in_float32(*(getattr(vae, part) for part in parts)):
            y = call(x.float())
    return y.float()
