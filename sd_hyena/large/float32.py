"""Modules that compute in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import nn


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
