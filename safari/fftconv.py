"""Long convolution in one and two dimensions. The one place where a backend is chosen."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

Pair = tuple[int, int]


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
    dtype = _wide(u.dtype)
    # Circular wrap-around is allowed where no output is read.
    n = fast_length(max(length + taps - 1 + first_lag, length - first_lag))
    with torch.autocast(u.device.type, enabled=False):
        spectrum = torch.fft.rfft(u.to(dtype), n) * torch.fft.rfft(h.to(dtype), n, norm="forward")
        y = torch.fft.irfft(spectrum, n, norm="forward")[..., -first_lag : length - first_lag]
    return y.to(u.dtype)


def long_conv2d(u: Tensor, h: Tensor, tile: int = 0) -> Tensor:
    """Centred linear (zero-padded) convolution, `y[i] = sum_D h[D] u[i - D]` over offsets |D| <= r in both directions.

    u: (..., H, W), h: (..., 2 r_y + 1, 2 r_x + 1), broadcast over the leading dimensions; returns u's shape and dtype.
    With `tile` cells a side the input is transformed tile by tile and the results added where they overlap: the same
    numbers with memory bounded by tile + 2 r. Raises ValueError for an even or empty filter.
    """
    if h.shape[-2] % 2 == 0 or h.shape[-1] % 2 == 0 or not u.numel():
        raise ValueError(f"cannot convolve {tuple(u.shape)} with a filter of {tuple(h.shape)}; its sides must be odd")
    if tile < 0:
        raise ValueError(f"tile={tile} must not be negative")
    reach = h.shape[-2] // 2, h.shape[-1] // 2
    n = transform_size(u.shape[-2:], reach, tile)
    return convolve2d(u, filter_spectrum(h.to(_wide(u.dtype)), n), n, reach, tile)


def transform_size(size: Pair, reach: Pair, tile: int = 0) -> Pair:
    """The lengths (n_y, n_x) of the transforms that convolve a grid (H, W), whole or in tiles.

    Circular wrap-around is allowed where no output is read. Of a tile all outputs are.
    """
    if 0 < tile < max(size):
        return tuple(fast_length(min(side, tile) + 2 * r) for side, r in zip(size, reach, strict=True))
    return tuple(fast_length(side + r) for side, r in zip(size, reach, strict=True))


def spectrum_bytes(n: Pair, dtype: torch.dtype) -> int:
    """Of one filter."""
    return n[0] * (n[1] // 2 + 1) * 2 * dtype.itemsize


def filter_spectrum(h: Tensor, n: Pair) -> Tensor:
    """A filter (..., 2 r_y + 1, 2 r_x + 1) of float32 or float64 as `convolve2d` takes it, with 1 / (n_y n_x) in it."""
    with torch.autocast(h.device.type, enabled=False):
        return torch.fft.rfft2(h, n, norm="forward")


def convolve2d(u: Tensor, spectrum: Tensor, n: Pair, reach: Pair, tile: int = 0) -> Tensor:
    """`long_conv2d` with a filter that has been transformed already, to these lengths for this grid and tile."""
    dtype = _wide(u.dtype)
    with torch.autocast(u.device.type, enabled=False):
        if not 0 < tile < max(u.shape[-2:]):
            y = _filtered(u.to(dtype), spectrum, n, slice(reach[0], reach[0] + u.shape[-2]))
            return y[..., reach[1] : reach[1] + u.shape[-1]].to(u.dtype)
        height, width = u.shape[-2:]
        shape = torch.broadcast_shapes(u.shape[:-2], spectrum.shape[:-2])
        y = u.new_zeros(*shape, height + 2 * reach[0], width + 2 * reach[1], dtype=dtype)
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                part = u[..., top : top + tile, left : left + tile].to(dtype)
                rows, columns = (side + 2 * r for side, r in zip(part.shape[-2:], reach, strict=True))
                full = _filtered(part, spectrum, n, slice(0, rows))
                y[..., top : top + rows, left : left + columns] += full[..., :columns]
        return y[..., reach[0] : reach[0] + height, reach[1] : reach[1] + width].to(u.dtype)


def _filtered(u: Tensor, spectrum: Tensor, n: Pair, rows: slice) -> Tensor:
    """The circular convolution (..., rows, n_x) of u (..., H, W) padded to n. Rows of zeros are not transformed, nor
    rows that nobody reads."""
    z = torch.fft.fft(torch.fft.rfft(u, n[1]), n[0], dim=-2) * spectrum
    return torch.fft.irfft(torch.fft.ifft(z, dim=-2, norm="forward")[..., rows, :], n[1], norm="forward")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
