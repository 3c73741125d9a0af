"""Convolutions along the columns and the rows of a grid by matrix products, without a transform.

B batch, (H, W) the grid, C channels, R rank. On a large grid a band of cells is computed at a time, from what lies
within the filter's reach, so that the cost grows as the number of cells. Unlike an FFT, matrix products may run in half
precision, so they follow the autocast.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

BAND = 128  # rows or columns at a time
CHANNELS = 32  # at a time, without a GPU: the matrices of more do not fit into a cache


def reversed_toeplitz(h: Tensor, length: int, margin: int = 0) -> Tensor:
    """The matrices that convolve with centred filters (C, R, 2 r + 1), the cells of the answer from last to first.

    `T[c, i, k, j] = h[c, k, (length - 1 - i) - (j - margin)]`, (C, length, R, length + 2 margin): `margin` cells before and
    after those that are computed are looked at too. In this order a matrix is one copy of overlapping windows; a Toeplitz
    matrix needs negative strides, and flipping it costs more than flipping the answer.
    Raises ValueError for an even filter, which has no centre.
    """
    if h.shape[-1] % 2 == 0:
        raise ValueError(f"a centred filter has an odd number of taps, not {h.shape[-1]}")
    missing = length - 1 + margin - h.shape[-1] // 2
    lags = F.pad(h, (missing, missing))  # the farthest two cells can be apart; a negative pad cuts
    return lags.flip(-1).mT.unfold(1, length + 2 * margin, 1).contiguous()


def bands(h: Tensor, length: int) -> Iterator[tuple[slice, Tensor]]:
    """How to convolve `length` cells with h (C, R, 2 r + 1) band by band: what each band is computed from, and its
    matrices (C, cells, R, seen), reversed."""
    number = max(1, round(length / BAND))
    size = -(-length // number)
    margin = h.shape[-1] // 2 if number > 1 else 0
    matrix = reversed_toeplitz(h, size, margin)
    for start in range(0, length, size):
        stop = min(start + size, length)
        seen = slice(max(start - margin, 0), min(stop + margin, length))
        offset = margin - start
        yield seen, matrix[:, size - (stop - start) :, :, seen.start + offset : seen.stop + offset]


def separable_conv2d(u: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """Centred zero-padded convolution with the filter `sum_r down_r(D_y) along_r(D_x)`.

    u: (B, C, H, W), down: (C, R, 2 r_y + 1), along: (C, R, 2 r_x + 1) -> (B, C, H, W).
    """
    channels = u.shape[1] if u.is_cuda else CHANNELS
    pieces = zip(u.split(channels, 1), down.split(channels), along.split(channels), strict=True)
    return _joined([_separable(*piece) for piece in pieces], dim=1)


def _separable(u: Tensor, down: Tensor, along: Tensor) -> Tensor:
    columns = bands(down.to(u.dtype), u.shape[-2])
    z = [[column.flatten(1, 2) @ plane[:, seen] for plane in u] for seen, column in columns]
    rows = [(seen, row.flatten(2).mT) for seen, row in bands(along.to(u.dtype), u.shape[-1])]

    def of_band(part: Tensor) -> Tensor:
        part = part.unflatten(1, (-1, down.shape[1]))  # (C, cells, R, W)
        return _joined([(part[..., seen].flatten(2) @ row).flip(1, 2) for seen, row in rows], dim=2)

    return _joined([torch.stack([of_band(part) for part in band]) for band in z], dim=2)


def axial_conv2d(u: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """Centred zero-padded convolution along each column plus that along each row.

    u: (B, C, H, W), down: (C, 1, 2 r_y + 1), along: (C, 1, 2 r_x + 1) -> (B, C, H, W).
    """
    columns = bands(down.to(u.dtype), u.shape[-2])
    z = [torch.stack([column.squeeze(2) @ plane[:, seen] for plane in u]).flip(2) for seen, column in columns]
    rows = bands(along.to(u.dtype), u.shape[-1])
    y = [torch.stack([plane[..., seen] @ row.squeeze(2).mT for plane in u]).flip(3) for seen, row in rows]
    return _joined(z, dim=2) + _joined(y, dim=3)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
