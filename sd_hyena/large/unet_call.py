"""A call of the UNet: its arguments on the whole canvas, changed part by part and stacked into one call of many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_hyena.large.tiling import Size


class Call(NamedTuple):
    """Arguments of the UNet on the whole canvas; of the ControlNet that goes with it, and the rows it acts on."""

    unet: dict[str, Any]
    control: dict[str, Any] | None
    gate: Tensor | None

    @property
    def rows(self) -> int:
        return len(self.unet["sample"])

    @property
    def canvas(self) -> Size:
        return tuple(self.unet["sample"].shape[-2:])


def each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same structure of lists with every tensor changed."""
    if isinstance(value, (list, tuple)):
        return [each(change, one) for one in value]
    return change(value) if isinstance(value, Tensor) else value


def stacked(values: Sequence[Any], rows: int) -> Any:
    """The arguments of several calls as those of one: tensors one below the other, what is no tensor from the first."""
    first = values[0]
    if len(values) == 1:
        return first
    if isinstance(first, dict):
        return {key: stacked([value[key] for value in values], rows) for key in first}
    if isinstance(first, (list, tuple)):
        return [stacked(list(one), rows) for one in zip(*values, strict=True)]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat([value.expand(rows, *value.shape[1:]) for value in values])
    return first
