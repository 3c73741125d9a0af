"""Peers' operators are what their papers say, held to naive definitions on small grids of odd sides."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers  # noqa: F401  (registers them)
from sd_hyena.options.operators import operator_named
from sd_hyena.sites import Site
from sd_hyena.students.student import build_student, spec_for

SIZE, D, HEADS = (5, 7), 12, 3
SITE = Site("IN01", "IN01", D, HEADS, 0)


@pytest.fixture
def streams():
    source = torch.Generator().manual_seed(0)
    return [torch.randn(2, SIZE[0] * SIZE[1], D, generator=source, dtype=torch.float64) for _ in range(4)]


def mixer(name: str, **options):
    torch.manual_seed(1)
    made = operator_named(name).resolve()
    return (made(D, HEADS, **options) if operator_named(name).heads else made(D, **options)).double()


def attention(q, k, v, mask=None):
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("radius", [0, 2, 3, 20])
def test_a_circle_is_the_attention_whose_far_keys_are_masked(streams, radius):
    *qkv, x = streams
    cells = torch.cartesian_prod(torch.arange(SIZE[0]), torch.arange(SIZE[1])).double()
    near = torch.cdist(cells, cells) <= radius + 1e-9
    torch.testing.assert_close(mixer("clear", radius=radius)(qkv, x, SIZE), attention(*qkv, near))


def test_pooled_keys_are_means_of_squares_also_at_the_border(streams):
    q, k, v, x = streams
    grid = [t.unflatten(1, SIZE) for t in (k, v)]
    means = [
        torch.stack([
            t[:, y : y + 2, x_ : x_ + 2].flatten(1, 2).mean(1) for y in range(0, 5, 2) for x_ in range(0, 7, 2)
        ], dim=1)
        for t in grid
    ]  # fmt: skip
    torch.testing.assert_close(mixer("todo")([q, k, v], x, SIZE), attention(q, *means))
    torch.testing.assert_close(mixer("todo", side=1)([q, k, v], x, SIZE), attention(q, k, v))


def test_tokens_that_are_not_merged_leave_attention_and_twins_that_are_share_an_answer(streams):
    *qkv, x = streams
    torch.testing.assert_close(mixer("tome", ratio=0.0)(qkv, x, SIZE), attention(*qkv))
    x = x.clone()
    x[:, 1] = 2 * x[:, 0]  # the most alike of all
    found = mixer("tome", ratio=1 / 35)(qkv, x, SIZE)
    merged = []
    for t in qkv:
        t = t.clone()
        t[:, 0] = (t[:, 0] + t[:, 1]) / 2
        merged.append(t[:, [0, *range(2, 35)]])
    expected = attention(*merged)
    torch.testing.assert_close(found[:, [0, *range(2, 35)]], expected)
    torch.testing.assert_close(found[:, 1], expected[:, 0])


@pytest.mark.parametrize("name, by_the_ridge", [("nystromformer", 0.05), ("kmeans", 0.1)])
def test_means_are_attention_with_a_landmark_for_each_token_and_equal_values_stay_equal(streams, name, by_the_ridge):
    q, k, v, x = streams
    torch.testing.assert_close(mixer(name, landmarks=35)([q, k, v], x, SIZE), attention(q, k, v))
    for landmarks in (6, 34):
        found = mixer(name, landmarks=landmarks)([q, k, torch.ones_like(v)], x, SIZE)
        assert (found - 1).abs().max() < by_the_ridge


def test_tokens_in_a_few_heaps_are_seen_exactly_through_the_means_of_these_heaps(streams):
    q, k, v, x = streams
    heap = torch.arange(35) % 5
    q, k = q[:, heap], k[:, heap]  # five different tokens, seven times each
    found = mixer("kmeans", landmarks=5)([q, k, v], x, SIZE)
    torch.testing.assert_close(found, attention(q, k, v), atol=1e-2, rtol=1e-2)  # but for the ridge


@pytest.mark.parametrize("name, streams_too, product_too", [("hyena_se", 1, 1), ("hyena_x", 1, 0), ("hyena_y", 0, 1)])
@pytest.mark.parametrize("axes", ["raster", "plane"])
def test_grafted_hyenas_are_gates_and_short_filters(streams, name, streams_too, product_too, axes):
    *qkv, x = streams
    module = mixer(name, axes=axes)
    q, k, v = (t.mT.unflatten(-1, SIZE) for t in qkv)
    torch.testing.assert_close(module(qkv, x, SIZE), qkv[0] * qkv[1] * qkv[2])  # filters start as the identity
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)

    def filtered(z, weight):
        if axes == "plane":
            padded = F.pad(z, (1, 1, 1, 1))
            return sum(
                weight[:, 0, i, j, None, None] * padded[..., i : i + 5, j : j + 7] for i in range(3) for j in range(3)
            )
        line = z.flatten(2)
        past = [torch.cat([torch.zeros_like(line[..., :n]), line[..., : 35 - n]], dim=-1) for n in range(4)]
        return sum(weight[:, 0, 3 - n, None] * shifted for n, shifted in enumerate(past)).view_as(z)

    if streams_too:
        q, k, v = (filtered(t, short.weight) for t, short in zip((q, k, v), module.streams, strict=True))
    product = filtered(k * v, module.product.weight) if product_too else k * v
    torch.testing.assert_close(module(qkv, x, SIZE), (q * product).flatten(2).mT)


@pytest.mark.parametrize("name", ["clear", "todo", "tome", "nystromformer", "kmeans", "hyena_se"])
def test_each_can_be_a_student(name):
    student = build_student(spec_for(SITE, name, {}, (8, 8)))
    assert student.spec.size is None and len(student.change) == 3
