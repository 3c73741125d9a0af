import math

import pytest
import torch

from safari import reference
from safari.clusters import averages, lloyd, nearest, sizes, spread


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 64, 1000, 4096, 6144])
def test_the_spread_order_meets_every_position_once_and_its_beginnings_lie_evenly(length):
    order = spread(length, length)
    assert sorted(order.tolist()) == list(range(length))
    for n in (5, 16, 100):
        if n < length:
            places = sorted(order[:n].tolist())
            gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + length], strict=True)]
            assert max(gaps) <= 3 * length / n + 1


@pytest.mark.parametrize("side", [16, 32, 64, 96, 128])
def test_a_beginning_of_the_order_follows_no_column_of_a_grid(side):
    """Each of four bands of columns gets about a fourth of 64 tokens."""
    column = spread(side * side, 64) % side
    assert torch.bincount(column * 4 // side, minlength=4).sub(16).abs().max() <= 6


def test_labels_are_lloyds_and_averages_those_of_plain_loops():
    x, values = randn(2, 3, 50, 4), randn(2, 3, 50, 5, seed=1)
    labels = lloyd(x, 7, steps=3)
    means = averages(values, labels, values[..., :7, :])
    for b in range(2):
        for n in range(3):
            for j, members in enumerate(reference.clusters(x[b, n], 7, steps=3)):
                assert labels[b, n].eq(j).nonzero().flatten().tolist() == members
                assert sizes(labels, 7)[b, n, j] == len(members)
                expected = values[b, n, members].mean(dim=0) if members else values[b, n, j]
                torch.testing.assert_close(means[b, n, j], expected)


def test_no_step_makes_the_tokens_farther_from_their_clusters():
    x, spread_of = randn(1, 2, 300, 3), []
    for steps in (1, 2, 4, 8):
        labels = lloyd(x, 9, steps)
        centers = averages(x, labels, x[..., :9, :])
        own = centers.gather(-2, labels[..., None].expand(-1, -1, -1, 3))
        spread_of.append((x - own).square().sum().item())
    assert spread_of == sorted(spread_of, reverse=True) and spread_of[-1] < 0.95 * spread_of[0]


def test_far_blobs_are_found_from_a_start_in_each():
    centers = 100 * randn(1, 1, 6, 8)
    x = centers.repeat(1, 1, 20, 1) + randn(1, 1, 120, 8, seed=1)
    labels = lloyd(x, 6, steps=2)
    assert torch.equal(labels[0, 0], torch.arange(120) % 6)
    torch.testing.assert_close(averages(x, labels, x[..., :6, :]), x.unflatten(2, (20, 6)).mean(dim=2))


def test_equal_tokens_are_one_cluster_and_the_empty_ones_keep_what_they_held():
    x = torch.ones(1, 1, 9, 2)
    labels, kept = lloyd(x, 3, steps=2), torch.tensor([[[[5.0], [6.0], [7.0]]]])
    assert labels.eq(0).all()
    assert averages(torch.arange(9.0).view(1, 1, 9, 1), labels, kept).flatten().tolist() == [4, 6, 7]


def test_gradients_pass_through_averages_as_through_any_mean():
    x = randn(1, 2, 8, 3).requires_grad_()
    labels = torch.tensor([[[0, 1, 1, 0, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3, 3, 1]]])
    assert torch.autograd.gradcheck(lambda t: averages(t, labels, torch.zeros(1, 2, 4, 3).double()), x)


@pytest.mark.parametrize("m", [1, 31, 64, 65, 96, 256, 544])
def test_nearest_is_the_nearest_of_any_number(m):
    x, centers = randn(2, 3, 70, 5), randn(2, 3, m, 5, seed=1)
    assert torch.equal(nearest(x, centers), torch.cdist(x, centers).argmin(dim=-1))


def test_of_equally_near_ones_nearest_takes_one():
    centers = randn(1, 1, 96, 4).index_copy(2, torch.tensor([5, 40, 90]), randn(1, 1, 1, 4, seed=1).expand(1, 1, 3, 4))
    assert set(nearest(centers, centers)[0, 0, [5, 40, 90]].tolist()) < {5, 40, 90}
    assert nearest(torch.ones(1, 1, 7, 4), torch.ones(1, 1, 96, 4)).eq(0).all()


def test_nearest_is_by_distance_and_not_by_product():
    x, centers = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[9.0, 0.0], [1.0, 0.5]]]])
    assert nearest(x, centers).item() == 1
    far = randn(2, 3, 40, 5), randn(2, 3, 11, 5, seed=1)
    torch.testing.assert_close(nearest(*far), torch.cdist(*far).argmin(-1))
    assert math.prod(nearest(*far).shape) == 2 * 3 * 40
