import pytest
import torch

from safari import long_conv, long_conv2d, reference
from safari.fftconv import convolve2d, fast_length, filter_spectrum, spectrum_bytes, transform_size

GRIDS = [(1, 1), (1, 7), (5, 3), (7, 7), (8, 11)]
REACHES = [(0, 0), (1, 2), (4, 1), (12, 9)]  # (12, 9) is larger than every grid
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


def random_grid(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def assert_equal_with_gradients(ours: torch.Tensor, theirs: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    weight = random_grid(*theirs.shape, seed=99).detach()
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    fast, slow = (torch.autograd.grad((y * weight).sum(), inputs) for y in (ours, theirs))
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("grid", GRIDS)
def test_long_conv2d_equals_the_definition_in_values_and_gradients(grid, reach):
    u, h = random_grid(2, 3, *grid), random_grid(3, *(2 * r + 1 for r in reach), seed=1)
    assert_equal_with_gradients(long_conv2d(u, h), reference.long_conv2d(u, h), (u, h))


@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 1), (2, 3), (4, 1, 3)])
@pytest.mark.parametrize("tile", [0, 2])
def test_long_conv2d_broadcasts_the_filter_over_the_leading_dimensions(leading, tile):
    u, h = random_grid(2, 3, 5, 4), random_grid(*leading, 3, 7, seed=1)
    assert_equal_with_gradients(long_conv2d(u, h, tile), reference.long_conv2d(u, h), (u, h))


@pytest.mark.parametrize("tile", [1, 3, 4, 100])
@pytest.mark.parametrize("grid", GRIDS)
def test_overlap_add_equals_the_whole_transform_in_values_and_gradients(grid, tile):
    for reach in REACHES:
        u, h = random_grid(2, 3, *grid), random_grid(3, *(2 * r + 1 for r in reach), seed=1)
        assert_equal_with_gradients(long_conv2d(u, h, tile), long_conv2d(u, h), (u, h))


def test_a_tile_bounds_the_transform_whatever_the_grid(monkeypatch):
    transform, sides = torch.fft.fft, []
    monkeypatch.setattr(
        torch.fft, "fft", lambda t, n, dim: sides.extend((n, 2 * t.shape[-1] - 2)) or transform(t, n, dim)
    )
    u, h = torch.randn(2, 61, 83), torch.randn(2, 5, 7)
    long_conv2d(u, h)
    assert max(sides) >= 83
    sides.clear()
    long_conv2d(u, h, tile=10)
    assert 10 <= max(sides) <= fast_length(10 + 6)


@pytest.mark.parametrize("tile", [0, 4])
def test_a_filter_transformed_once_serves_every_grid_of_its_size(tile):
    h, reach = random_grid(3, 5, 7, seed=1), (2, 3)
    n = transform_size((9, 11), reach, tile)
    spectrum = filter_spectrum(h, n)
    assert spectrum[0].numel() * spectrum.element_size() == spectrum_bytes(n, h.dtype)
    for seed in range(2):
        u = random_grid(2, 3, 9, 11, seed=seed + 2)
        assert torch.equal(convolve2d(u, spectrum, n, reach, tile), long_conv2d(u, h, tile))


def test_an_impulse_comes_back_as_the_filter_where_it_stands():
    u, h = torch.zeros(9, 11, dtype=torch.float64), random_grid(3, 5).detach()
    u[3, 6] = 1
    y = long_conv2d(u, h)
    torch.testing.assert_close(y[2:5, 4:9], h)
    y[2:5, 4:9] = 0
    assert y.abs().max() < 1e-12


def test_two_dimensions_in_float32_are_exact_to_rounding_with_a_large_mean():
    u, h = torch.randn(4, 61, 83) + 10, torch.randn(4, 21, 31) * 0.05
    exact = long_conv2d(u.double(), h.double())
    for y in (long_conv2d(u, h), long_conv2d(u, h, tile=16)):
        assert (y - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("tile", [0, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_grids_are_transformed_in_float32_whatever_the_autocast(dtype, tile):
    u, h = (torch.randn(2, 97, 101) + 8).to(dtype), torch.randn(2, 9, 13) / 100  # 8 * 97 * 101 > 65504
    with torch.autocast("cpu", torch.bfloat16):
        y, y_of_half_filter = long_conv2d(u, h, tile), long_conv2d(u, h.to(dtype), tile)
    assert y.dtype == y_of_half_filter.dtype == dtype
    assert torch.equal(y, long_conv2d(u.float(), h, tile).to(dtype))
    assert torch.equal(y_of_half_filter, long_conv2d(u.float(), h.to(dtype).float(), tile).to(dtype))
    exact = long_conv2d(u.double(), h.double())
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("sides", [(2, 3), (3, 2), (4, 4), (0, 3), (3, 0)])
def test_an_even_or_empty_filter_is_refused_with_its_sides(sides):
    for tile in (0, 2):
        with pytest.raises(ValueError, match=rf"\({sides[0]}, {sides[1]}\)"):
            long_conv2d(torch.zeros(5, 5), torch.zeros(sides), tile)


@pytest.mark.parametrize("grid", [(0, 3), (3, 0)])
def test_an_empty_grid_is_refused_with_its_sides(grid):
    with pytest.raises(ValueError, match=rf"\({grid[0]}, {grid[1]}\)"):
        long_conv2d(torch.zeros(grid), torch.zeros(3, 3))
