"""How much memory a network may take while it is built from what a stranger's file says of its sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

RANGES = ("aten::arange", "aten::linspace", "aten::eye")


class OverBudget(Exception):
    """More was asked for than there is reason to."""


class Budget(TorchDispatchMode):
    """Within the block, PyTorch makes new tensors of at most so many numbers in all. Raises OverBudget before it makes more."""

    def __init__(self, numbers: int):
        super().__init__()
        self.left = numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs or {})
        asked = max(_asked(func, args), default=0)
        self._spend(asked)
        made = func(*args, **kwargs or {})
        self._spend(sum(one.numel() for one in pytree.tree_leaves(made) if isinstance(one, Tensor)) - asked)
        return made

    def _spend(self, numbers: int) -> None:
        self.left -= max(numbers, 0)
        if self.left < 0:
            raise OverBudget("it would be larger than its file")


def _asked(func: Any, args: tuple) -> Iterator[int]:
    """How many numbers a call will make, as far as its arguments tell."""
    first = args[0] if args else None
    if isinstance(first, list | tuple | Size) and first and all(isinstance(n, int) for n in first):
        yield math.prod(first)
    if func._schema.name in RANGES:
        yield int(max((abs(n) for n in args if isinstance(n, int | float) and math.isfinite(n)), default=0))
    if torch.Tag.pointwise in func.tags:
        yield math.prod(torch.broadcast_shapes(*(one.shape for one in args if isinstance(one, Tensor))))
