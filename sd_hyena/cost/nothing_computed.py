"""Tensors of a size and no content, on which what a call takes is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._subclasses import FakeTensorMode

SHAPES = 8192  # of operations whose answers are known, some KiB each


@contextmanager
def nothing_computed(**given: bool) -> Iterator[None]:
    """PyTorch's FakeTensorMode (which takes what is `given`), forgetting what it met when that is much: it keeps every
    operation at every shape as long as the process lives."""
    with FakeTensorMode(**given):
        yield
    if FakeTensorMode.cache_info().size > SHAPES:
        FakeTensorMode.cache_clear()
