"""Where and how thoroughly a run measures, and how fast its machine is at best."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sd_hyena.cost.timing import interleaved


@dataclass(frozen=True)
class Setting:
    """A run's device, storage dtype, and whether it has to be quick."""

    device: torch.device
    dtype: torch.dtype
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches in this run: bytes a second of a copy, operations a second of a matrix product."""

    copy: float
    matmul: float

    def seconds(self, operations: float, bytes_: float) -> float:
        """The roofline: no call of so many operations and bytes is faster."""
        return max(operations / self.matmul, bytes_ / self.copy)


@torch.no_grad()
def ceilings(setting: Setting) -> Ceilings:
    """Measured, the best of several."""
    given = {"device": setting.device, "dtype": setting.dtype}
    n, cells = (8192, 1 << 29) if setting.on_gpu else (1024, 1 << 24)
    a, b = torch.randn(n, n, **given), torch.randn(n, n, **given)
    source, target = torch.zeros(cells, **given), torch.zeros(cells, **given)
    multiply, copy = interleaved([lambda: a @ b, lambda: target.copy_(source)], 8, setting.device)
    return Ceilings(2 * cells * source.element_size() / min(copy), 2 * n**3 / min(multiply))
