"""What is computed from a module's weights alone, kept between calls for as long as the weights stay."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor


class FilterCache:
    """Filters by grid, dtype or whatever else they depend on beside the weights. At most `budget` bytes in all.

    It holds nothing while gradients are recorded or a graph is compiled, and lets go of everything when a weight is
    changed in place, replaced or moved. It is no part of a state dict; a copy of it, pickled or not, starts empty.
    """

    budget = 64 * 2**20  # bytes: the spectra of 320 channels on a grid of 128 x 128

    def __init__(self):
        self._kept: dict[Hashable, tuple[Tensor, ...]] = {}
        self._weights: list[tuple[Tensor, int]] = []

    def get(
        self, key: Hashable, weights: Iterable[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """What `make` returns, which must depend on `key` and `weights` only."""
        weights = list(weights)
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not all(map(_is_tracked, weights)):
            self.clear()
            return make()
        if not self._still(weights):
            self.clear()
            self._weights = [(weight.detach(), weight._version) for weight in weights]
        if key not in self._kept:
            made = make()
            if self.held_bytes() + _bytes(made) > self.budget:
                self._kept.clear()
            if _bytes(made) > self.budget:
                return made
            self._kept[key] = made
        return self._kept[key]

    def clear(self) -> None:
        self._kept.clear()
        self._weights = []

    def held_bytes(self) -> int:
        return sum(map(_bytes, self._kept.values()))

    def _still(self, weights: list[Tensor]) -> bool:
        """Same memory, which the aliases kept here hold fast, and never written to since."""
        return len(weights) == len(self._weights) and all(
            now.device == then.device and now.is_set_to(then) and now._version == version
            for now, (then, version) in zip(weights, self._weights, strict=True)
        )

    def __deepcopy__(self, _memo: dict) -> FilterCache:
        return FilterCache()

    def __reduce__(self):
        return FilterCache, ()


def _is_tracked(weight: Tensor) -> bool:
    """Whether PyTorch counts the writes to it; fake tensors, and what an inference mode made, are left alone."""
    return type(weight.detach()) is Tensor and not weight.is_inference()


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
