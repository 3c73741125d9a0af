"""The low band of pictures: what Daubechies' orthonormal wavelets (1988) leave of them at half the resolution and less."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@functools.cache
def daubechies(moments: int) -> tuple[float, ...]:
    """The low-pass filter of 2 `moments` taps, of unit norm, with so many vanishing moments: db4 has four.

    Of the polynomial that the half-band condition leaves, the roots within the unit circle.
    """
    rest = np.polynomial.Polynomial([math.comb(moments - 1 + k, k) for k in range(moments)])  # in y
    roots = []
    for y in rest.roots():  # y = (2 - z - 1/z) / 4
        pair = np.roots([1, 4 * y - 2, 1])
        roots.append(pair[np.argmin(abs(pair))])
    taps = np.poly([*roots, *[-1] * moments]).real
    return tuple((taps * math.sqrt(2) / taps.sum()).tolist())


def low_band(x: Tensor, levels: int = 1, moments: int = 4, circular: bool = False) -> Tensor:
    """The part of pictures (B, C, H, W) that lies in the approximation of `levels` levels, at their own size.

    Borders are mirrored, or go round. It is a projection but for the borders, and keeps constants and ramps.
    """
    taps = torch.tensor(daubechies(moments), dtype=x.dtype, device=x.device)
    size = x.shape[-2:]
    margin = min(len(taps) * 2**levels, *(side - 1 for side in size))
    far = [margin + -(side + 2 * margin) % 2**levels for side in size]
    inside = "circular" if circular else "reflect"
    x = F.pad(x, (margin, far[1], margin, far[0]), mode=inside if min(size) > max(far) else "replicate")
    down = x
    for _ in range(levels):
        down = _halved(_halved(down, taps).mT, taps).mT
    for _ in range(levels):
        down = _doubled(_doubled(down, taps).mT, taps).mT
    return down[..., margin : margin + size[0], margin : margin + size[1]]


def _halved(x: Tensor, taps: Tensor) -> Tensor:
    """Along the last axis, which goes round: correlated with the taps, every other value."""
    rows = x.reshape(-1, 1, x.shape[-1])
    rows = torch.cat([rows] * -(-len(taps) // x.shape[-1]) + [rows], -1)[..., : x.shape[-1] + len(taps) - 2]
    return F.conv1d(rows, taps[None, None], stride=2).view(*x.shape[:-1], -1)


def _doubled(x: Tensor, taps: Tensor) -> Tensor:
    """The transpose of `_halved`."""
    length = 2 * x.shape[-1]
    rows = F.conv_transpose1d(x.reshape(-1, 1, x.shape[-1]), taps[None, None], stride=2)[:, 0]
    whole = F.pad(rows, (0, -rows.shape[-1] % length)).view(len(rows), -1, length).sum(1)
    return whole.view(*x.shape[:-1], length)
