"""Long convolution in O(L log L). The one place where a backend is chosen."""

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
