import pytest
import torch

from safari import long_conv2d, reference, toeplitz
from safari.toeplitz import axial_conv2d, reversed_toeplitz, separable_conv2d
from tests.gate import gated
from tests.safari.test_fftconv import GRIDS, REACHES, assert_equal_with_gradients, random_grid


@pytest.mark.parametrize("margin", [0, 1, 5])
@pytest.mark.parametrize("length, reach", [(1, 0), (1, 4), (2, 1), (7, 2), (7, 6), (7, 11), (11, 10)])
def test_a_reversed_toeplitz_matrix_holds_the_tap_of_every_pair_of_cells(length, reach, margin):
    h = random_grid(3, 2, 2 * reach + 1)
    matrix = reversed_toeplitz(h, length, margin)
    assert matrix.shape == (3, length, 2, length + 2 * margin) and matrix.is_contiguous()
    for i in range(length):
        for j in range(-margin, length + margin):
            expected = h[..., i - j + reach] if abs(i - j) <= reach else torch.zeros(3, 2, dtype=torch.float64)
            assert torch.equal(matrix[:, length - 1 - i, :, j + margin], expected)


def test_an_even_filter_is_refused_with_its_taps():
    with pytest.raises(ValueError, match="not 4"):
        reversed_toeplitz(torch.zeros(1, 1, 4), 3)


@pytest.fixture(params=[*gated([((2, 2),)]), (3, 2), (128, 32)], ids="bands of {0[0]}, {0[1]} channels".format)
def pieces(request, monkeypatch):
    """Bands and pieces of channels far smaller than the grids, and as they are."""
    monkeypatch.setattr(toeplitz, "BAND", request.param[0])
    monkeypatch.setattr(toeplitz, "CHANNELS", request.param[1])


@pytest.mark.parametrize("rank", [*gated([1]), 3])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_separable_convolution_is_that_with_the_sum_of_outer_products(pieces, grid, reach, rank):
    u = random_grid(2, 3, *grid)
    down, along = (random_grid(3, rank, 2 * r + 1, seed=r + 1) for r in reach)
    h = torch.einsum("cry,crx->cyx", down, along)
    ours = separable_conv2d(u, down, along)
    assert_equal_with_gradients(ours, long_conv2d(u, h), (u, down, along))
    if rank == 3:
        torch.testing.assert_close(ours, reference.long_conv2d(u, h), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("grid", GRIDS)
def test_an_axial_convolution_is_that_along_the_columns_plus_that_along_the_rows(pieces, grid, reach):
    u = random_grid(2, 3, *grid)
    down, along = (random_grid(3, 1, 2 * r + 1, seed=r + 1) for r in reach)
    expected = reference.long_conv2d(u, down.mT) + reference.long_conv2d(u, along)
    assert_equal_with_gradients(axial_conv2d(u, down, along), expected, (u, down, along))


@pytest.mark.parametrize("band", [16, 128])
def test_float32_is_exact_to_rounding_with_a_large_mean(band, monkeypatch):
    monkeypatch.setattr(toeplitz, "BAND", band)
    u, (down, along) = torch.randn(1, 4, 61, 83) + 10, torch.randn(2, 4, 2, 21) * 0.2
    exact = separable_conv2d(u.double(), down.double(), along.double())
    assert (separable_conv2d(u, down, along) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_a_matrix_is_never_larger_than_a_band_and_its_reach(monkeypatch):
    """So the work grows as the number of cells, not as its square root times that."""
    sizes, make = [], reversed_toeplitz
    monkeypatch.setattr(toeplitz, "reversed_toeplitz", lambda *a: sizes.append(make(*a).shape[1:4:2]) or make(*a))
    separable_conv2d(torch.randn(1, 1, 600, 1000), *torch.randn(2, 1, 1, 11))
    assert sizes == [(120, 130), (125, 135)]
