import pytest
import torch

from safari import long_conv, reference
from safari.fftconv import fast_length

LENGTHS = [1, 2, 7, 63, 100, 1000]


def lags(length: int, direction: str) -> tuple[int, int]:
    """Taps and first lag of a filter."""
    return (length, 0) if direction == "causal" else (2 * length - 1, -(length - 1))


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("length", LENGTHS)
def test_long_conv_equals_the_definition_in_values_and_gradients(length, direction):
    taps, first = lags(length, direction)
    batch, channels = (2, 3) if length < 500 else (1, 1)
    source = torch.Generator().manual_seed(length)
    u = torch.randn(batch, channels, length, dtype=torch.float64, generator=source, requires_grad=True)
    h = torch.randn(channels, taps, dtype=torch.float64, generator=source, requires_grad=True)
    weight = torch.randn(batch, channels, length, dtype=torch.float64, generator=source)
    y = long_conv(u, h, first)
    fast = torch.autograd.grad((y * weight).sum(), (u, h))
    if length == 1000:  # the loops of the reference are slow; its matrix is the same sum
        t = torch.arange(length)
        index = t[:, None] - t - first
        toeplitz = torch.where((index >= 0) & (index < taps), h[:, index.clamp(0, taps - 1)], 0)
        expected = torch.einsum("cts,bcs->bct", toeplitz, u)
    else:
        expected = reference.long_conv(u, h, first)
    slow = torch.autograd.grad((expected * weight).sum(), (u, h))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(fast, slow, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [2, 7, 100])
def test_a_causal_convolution_never_sees_the_future_and_a_bidirectional_one_sees_all(length):
    u = torch.randn(1, length, dtype=torch.float64, requires_grad=True)
    for direction in ("causal", "bidirectional"):
        taps, first = lags(length, direction)
        h = torch.rand(1, taps, dtype=torch.float64) + 0.5
        middle = length // 2
        (seen,) = torch.autograd.grad(long_conv(u, h, first)[0, middle], u)
        future = seen[0, middle + 1 :].abs()
        assert (seen[0, : middle + 1].abs() > 0.4).all()
        assert (future < 1e-12).all() if direction == "causal" else (future > 0.4).all()


def test_float32_is_exact_to_rounding_with_a_large_mean():
    u, h = torch.randn(4, 1000) + 10, torch.randn(4, 1000) * 0.05
    exact = long_conv(u.double(), h.double())
    error = (long_conv(u, h) - exact).abs().max() / exact.abs().max()
    assert error < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_transformed_in_float32_whatever_the_autocast(dtype):
    u, h = (torch.randn(2, 5000) + 8).to(dtype), torch.randn(2, 5000) / 100
    with torch.autocast("cpu", torch.bfloat16):
        y = long_conv(u, h)
    assert y.dtype == dtype and y.isfinite().all()
    torch.testing.assert_close(y, long_conv(u.double(), h.double()).to(dtype), rtol=2e-2, atol=1e-2)


def test_fast_length_is_the_smallest_even_smooth_number():
    def smooth(n):
        for p in (2, 3, 5, 7):
            while n % p == 0:
                n //= p
        return n == 1

    for n in range(1, 3000):
        size = fast_length(n)
        assert size >= n and size % 2 == 0 and smooth(size)
        assert not any(m % 2 == 0 and smooth(m) for m in range(max(n, 2), size))


def test_what_cannot_work_raises_with_the_numbers():
    with pytest.raises(ValueError, match="0 tokens"):
        long_conv(torch.zeros(1, 0), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="0 taps"):
        long_conv(torch.zeros(1, 3), torch.zeros(1, 0))
    for first_lag in (1, -3):
        with pytest.raises(ValueError, match=str(first_lag)):
            long_conv(torch.zeros(1, 4), torch.zeros(1, 3), first_lag)
