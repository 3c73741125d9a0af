"""Long convolution in one and two dimensions. The one place where a backend is chosen."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def fast_length(n: int) -> int:
    """The smallest even number >= n whose prime factors are 2, 3, 5 and 7: lengths every FFT library is fast at."""
    size = n + n % 2 if n > 1 else 2
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 2


def long_conv(u: Tensor, h: Tensor, first_lag: int = 0) -> Tensor:
    """Linear (zero-padded) convolution, `y[t] = sum_j h[j] u[t - first_lag - j]` for 0 <= t < L.

    u: (..., L), h: (..., K), broadcast over the leading dimensions; returns u's length and dtype. `first_lag=0` is
    causal; `first_lag=-(L-1)` with K = 2L-1 reaches every token from every token. The transform runs in float32
    (float64 for float64 input) whatever the autocast: in half precision the DC bin, mean * L, overflows.

    Raises ValueError for an empty signal or filter, and for a filter that looks only into the future (first_lag > 0
    is a delay nobody needs, first_lag <= -K never meets lag 0).
    """
    length, taps = u.shape[-1], h.shape[-1]
    if length == 0 or taps == 0:
        raise ValueError(f"cannot convolve {length} tokens with a filter of {taps} taps")
    if not -taps < first_lag <= 0:
        raise ValueError(f"first_lag={first_lag} leaves lag 0 outside a filter of {taps} taps")
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    # Circular wrap-around is allowed where no output is read.
    n = fast_length(max(length + taps - 1 + first_lag, length - first_lag))
    with torch.autocast(u.device.type, enabled=False):
        spectrum = torch.fft.rfft(u.to(dtype), n) * torch.fft.rfft(h.to(dtype), n)
        y = torch.fft.irfft(spectrum, n)[..., -first_lag : length - first_lag]
    return y.to(u.dtype)


def long_conv2d(u: Tensor, h: Tensor, tile: int = 0) -> Tensor:
    """Centred linear (zero-padded) convolution, `y[i] = sum_D h[D] u[i - D]` over offsets |D| <= r in both directions.

    u: (..., H, W), h: (..., 2 r_y + 1, 2 r_x + 1), broadcast over the leading dimensions; returns u's shape and dtype.
    With `tile` cells a side the input is transformed tile by tile and the results added where they overlap: the same
    numbers with memory bounded by tile + 2 r. Raises ValueError for an even or empty filter.
    """
    reach = h.shape[-2] // 2, h.shape[-1] // 2
    if h.shape[-2] % 2 == 0 or h.shape[-1] % 2 == 0 or not u.numel():
        raise ValueError(f"cannot convolve {tuple(u.shape)} with a filter of {tuple(h.shape)}; its sides must be odd")
    if tile < 0:
        raise ValueError(f"tile={tile} must not be negative")
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    with torch.autocast(u.device.type, enabled=False):
        if not tile or tile >= max(u.shape[-2:]):
            return _transformed(u.to(dtype), h.to(dtype), crop=True).to(u.dtype)
        height, width = u.shape[-2:]
        shape = torch.broadcast_shapes(u.shape[:-2], h.shape[:-2])
        y = u.new_zeros(*shape, height + 2 * reach[0], width + 2 * reach[1], dtype=dtype)
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                part = u[..., top : top + tile, left : left + tile].to(dtype)
                full = _transformed(part, h.to(dtype), crop=False)
                y[..., top : top + full.shape[-2], left : left + full.shape[-1]] += full
        return y[..., reach[0] : reach[0] + height, reach[1] : reach[1] + width].to(u.dtype)


def _transformed(u: Tensor, h: Tensor, crop: bool) -> Tensor:
    """The full convolution (H + 2 r_y, W + 2 r_x), or cropped to u's own grid, which needs a shorter transform."""
    (height, width), reach = u.shape[-2:], (h.shape[-2] // 2, h.shape[-1] // 2)
    # Circular wrap-around is allowed where no output is read; a tap farther than the grid is wide meets nothing.
    grow = 1 if crop else 2
    n = fast_length(height + grow * reach[0]), fast_length(width + grow * reach[1])
    y = torch.fft.irfft2(torch.fft.rfft2(u, n) * torch.fft.rfft2(h, n), n)
    if crop:
        return y[..., reach[0] : reach[0] + height, reach[1] : reach[1] + width]
    return y[..., : height + 2 * reach[0], : width + 2 * reach[1]]


def toeplitz(h: Tensor, length: int) -> Tensor:
    """The matrix (..., length, length) that convolves with a centred filter (..., 2 r + 1): `T[i, j] = h[i - j]`.

    Raises ValueError for an even filter, which has no centre.
    """
    if h.shape[-1] % 2 == 0:
        raise ValueError(f"a centred filter has an odd number of taps, not {h.shape[-1]}")
    reach = h.shape[-1] // 2
    lags = torch.nn.functional.pad(h, (length - 1 - reach, length - 1 - reach))  # -(length - 1) ... length - 1
    return lags.flip(-1).unfold(-1, length, 1).flip(-2)


def separable_conv2d(u: Tensor, down: Tensor, along: Tensor) -> Tensor:
    """Centred convolution with the filter `sum_r down_r(D_y) along_r(D_x)`, as two matrix products and no transform.

    u: (B, C, H, W), down: (C, R, 2 r_y + 1), along: (C, R, 2 r_x + 1) -> (B, C, H, W). Unlike an FFT, matrix products
    may run in half precision, so they follow the autocast.
    """
    height, width = u.shape[-2:]
    columns, rows = (toeplitz(f, n).to(u.dtype) for f, n in ((down, height), (along, width)))
    return (columns @ u.unsqueeze(2) @ rows.mT).sum(dim=2)
