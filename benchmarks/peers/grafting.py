"""Hyena-SE, -X and -Y as in "Exploring Diffusion Transformer Designs via Grafting" (Chandrasegaran et al. 2025).

B batch, (H, W) the grid, L = H W, D channels. As published they run along the raster, causal, with filters of four; over the
plane, with squares of three that look all around, they are the same with a picture's neighbourhood.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator

TAPS, SIDE = 4, 3
Axes = Literal["raster", "plane"]


class Short(nn.Module):
    """A short explicit filter of each channel of (B, D, H, W), at first the identity."""

    def __init__(self, d_model: int, axes: Axes):
        super().__init__()
        if axes not in ("raster", "plane"):
            raise ValueError(f"axes={axes!r} is neither raster nor plane")
        self.axes = axes
        self.weight = nn.Parameter(torch.zeros(d_model, 1, *((TAPS,) if axes == "raster" else (SIDE, SIDE))))
        self.weight.data.flatten(1)[:, -1 if axes == "raster" else SIDE**2 // 2] = 1

    def forward(self, z: Tensor) -> Tensor:
        if self.axes == "plane":
            return F.conv2d(z, self.weight, padding=SIDE // 2, groups=len(self.weight))
        line = F.pad(z.flatten(2), (TAPS - 1, 0))
        return F.conv1d(line, self.weight, groups=len(self.weight)).view_as(z)


class _Grafted(nn.Module):
    """`q h(k v)`, with filters of its streams, of the product, or of both."""

    of_streams, of_product = True, True

    def __init__(self, d_model: int, *, axes: Axes = "raster"):
        super().__init__()
        self.streams = nn.ModuleList(Short(d_model, axes) for _ in range(3)) if self.of_streams else None
        self.product = Short(d_model, axes) if self.of_product else nn.Identity()

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = (t.mT.unflatten(-1, size) for t in streams)
        if self.streams is not None:
            q, k, v = (short(t) for short, t in zip(self.streams, (q, k, v), strict=True))
        return (q * self.product(k * v)).flatten(2).mT


@register_operator("hyena_se", "Grafting's: filters of the streams, a gate, a short explicit filter", gates=True)
class HyenaSE(_Grafted):
    pass


@register_operator("hyena_x", "Grafting's: filters of the streams, and gates only", gates=True)
class HyenaX(_Grafted):
    of_product = False


@register_operator("hyena_y", "Grafting's: gates, and one explicit filter between them", gates=True)
class HyenaY(_Grafted):
    of_streams = False
