import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_hyena.errors import BadInput
from sd_hyena.large.tiling import WEIGHTS, Rect, add, batches, cut, feather, grid, starts, weights

lengths, tiles = st.integers(33, 400), st.integers(8, 128)
shifts = st.one_of(st.none(), st.floats(0, 1, exclude_max=True))


def cells(start, tile, length):
    """The cells of an axis that a tile covers, going round."""
    return [(start + i) % length for i in range(min(tile, length))]


@settings(max_examples=400, deadline=None)
@given(lengths, tiles, st.floats(0, 0.99), shifts, st.booleans())
def test_tiles_cover_every_cell_of_an_axis_and_share_at_least_the_overlap(length, tile, part, shift, circular):
    overlap = int(part * tile)
    found = starts(length, tile, overlap, shift, circular)
    assert {cell for start in found for cell in cells(start, tile, length)} == set(range(length))
    if not circular:
        assert found[0] == 0 and found[-1] == max(length - tile, 0) and found == sorted(set(found))
    if tile <= length:
        ordered = sorted(found)
        rounds = [*ordered, ordered[0] + length] if circular else ordered
        gaps = [b - a for a, b in pairwise(rounds)]
        assert all(gap <= tile - overlap for gap in gaps)
        if shift is None and gaps:
            assert max(gaps) - min(gaps) <= 1  # spread evenly


@settings(max_examples=60, deadline=None)
@given(
    st.integers(33, 120),
    st.integers(33, 120),
    st.integers(8, 64),
    st.integers(8, 64),
    st.tuples(shifts, shifts),
    st.booleans(),
)
def test_a_grid_covers_every_cell_of_the_canvas(height, width, tile_height, tile_width, shift, circular):
    covered = torch.zeros(height, width)
    overlap = min(tile_height, tile_width) // 2
    rects = grid((height, width), (tile_height, tile_width), overlap, None if None in shift else shift, circular)
    for rect in rects:
        assert rect[2:] == (min(tile_height, height), min(tile_width, width))
        rows, columns = cells(rect.top, rect.height, height), cells(rect.left, rect.width, width)
        covered[torch.tensor(rows)[:, None], torch.tensor(columns)] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize("overlap, count", [(8, 6), (32, 8), (48, 10)])
def test_a_4096_pixel_picture_has_as_many_tiles_as_tiled_diffusion_makes(overlap, count):
    assert len(starts(512, 96, overlap)) == count


def test_tiles_without_overlap_share_nothing_where_the_canvas_is_a_multiple():
    for shift in (None, 0.0, 0.7):
        assert starts(96, 32, 0, shift, circular=True) == [(int((shift or 0) * 96) + s) % 96 for s in (0, 32, 64)]
    assert starts(96, 32) == [0, 32, 64]
    assert starts(96, 32, 0, 0.5) == [0, 16, 48, 64]


@pytest.mark.parametrize("canvas", [(12, 17), (17, 17), (33, 40)])
@pytest.mark.parametrize("rect", [Rect(0, 0, 8, 8), Rect(4, 8, 8, 9), Rect(3, 1, 9, 16)])
def test_cutting_takes_the_plain_slice_of_latents_and_of_the_picture(canvas, rect):
    latents = torch.randn(2, 4, *canvas)
    picture = torch.randn(2, 3, 8 * canvas[0], 8 * canvas[1])
    top, left, h, w = rect
    assert torch.equal(cut(latents, rect, canvas), latents[..., top : top + h, left : left + w])
    assert torch.equal(cut(picture, rect, canvas), picture[..., 8 * top : 8 * (top + h), 8 * left : 8 * (left + w)])


def test_cutting_goes_round_a_circular_canvas():
    x = torch.randn(1, 1, 10, 12)
    assert torch.equal(cut(x, Rect(7, 9, 6, 5), (10, 12)), x.roll((-7, -9), (-2, -1))[..., :6, :5])
    picture = torch.randn(1, 3, 80, 96)
    assert torch.equal(cut(picture, Rect(7, 9, 6, 5), (10, 12)), picture.roll((-56, -72), (-2, -1))[..., :48, :40])


@pytest.mark.parametrize("canvas", [(32, 48), (33, 47), (40, 24)])
def test_cutting_an_inner_map_at_a_multiple_of_its_step_takes_the_plain_slice(canvas):
    for step in (2, 4, 8):
        size = math.ceil(canvas[0] / step), math.ceil(canvas[1] / step)
        x = torch.randn(2, 5, *size)
        part = cut(x, Rect(8, 16, 16, 8), canvas)
        assert torch.equal(part, x[..., 8 // step : 24 // step, 16 // step : 24 // step])
        assert cut(x, Rect(3, 5, 13, 9), canvas).shape[-2:] == (math.ceil(13 / step), math.ceil(9 / step))


@pytest.mark.parametrize("size", [(80, 97), (100, 96), (160, 96), (5, 7)])
def test_a_map_of_another_size_is_one_clear_line(size):
    with pytest.raises(BadInput, match=f"{size[1]}x{size[0]} does not fit latents of 12x10.*96x80") as error:
        cut(torch.zeros(1, 3, *size), Rect(0, 0, 8, 8), (10, 12))
    assert "\n" not in str(error.value)


def test_adding_is_the_inverse_of_cutting():
    x = torch.randn(2, 3, 10, 14)
    total = torch.zeros_like(x)
    rects = grid((10, 14), (5, 7), 0, (0.3, 0.6), circular=True)
    for rect in rects:
        add(total, rect, cut(x, rect, (10, 14)))
    assert len(rects) == 4 and torch.equal(total, x)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("height, width", [(96, 96), (33, 80), (16, 9)])
def test_weights_are_symmetric_positive_float32_also_where_a_gaussian_would_vanish(kind, height, width):
    w = weights(kind, height, width, 8)
    assert w.shape == (height, width) and w.dtype == torch.float32
    assert torch.equal(w, w.flip(0)) and torch.equal(w, w.flip(1))
    assert w.min() >= 1e-6 and w.max() <= 1 and (1 / w).half().isfinite().logical_or(w < 2e-5).all()


def test_a_gaussian_is_as_wide_as_its_tile_on_both_axes():
    """exp(-(i - (n - 1) / 2)² / n² / (2 · .01)) of each side by itself."""
    w = weights("gaussian", 24, 80)
    rows = [math.exp(-(((i - 11.5) / 24) ** 2) / 0.02) for i in range(24)]
    columns = [math.exp(-(((i - 39.5) / 80) ** 2) / 0.02) for i in range(80)]
    expected = torch.tensor([[max(a * b, 1e-6) for b in columns] for a in rows])
    torch.testing.assert_close(w, expected)


@pytest.mark.parametrize("kind", ["ramp", "cosine"])
def test_ramps_of_two_neighbours_add_up_to_one(kind):
    w = weights(kind, 20, 20, 6)[10]
    torch.testing.assert_close(w[-6:] + w[:6], torch.ones(6))
    assert torch.equal(w[6:14], torch.ones(8)) and (w[:6].diff() > 0).all()
    assert torch.equal(weights("uniform", 20, 20, 6), torch.ones(20, 20))


@pytest.mark.parametrize("height, width", [(20, 31), (21, 21), (40, 12), (2, 9), (1, 1)])
@pytest.mark.parametrize("ratio", [0, 0.2, 0.5, 1])
def test_a_feather_is_the_square_of_the_distance_and_the_same_on_all_four_sides(height, width, ratio):
    mask = feather(Rect(5, 5, height, width), (60, 60), ratio)
    radius = min(int(min(height // 2, width // 2) * ratio), (min(height, width) - 1) // 2)
    for y in range(height):
        for x in range(width):
            distance = min(x, width - 1 - x, y, height - 1 - y)
            expected = (distance / radius) ** 2 if distance < radius else 1
            assert mask[y, x].item() == pytest.approx(expected)
    assert mask.max() == 1


def test_a_feather_does_not_fall_towards_the_border_of_the_canvas():
    mask = feather(Rect(0, 10, 20, 20), (20, 40), 0.5)
    assert torch.equal(mask, mask[:1].expand(20, 20)) and mask[0, 0] == mask[0, -1] == 0 < mask[0, 5] == 1
    corner = feather(Rect(20, 20, 20, 20), (40, 40), 0.5)
    assert corner[-1, -1] == 1 and not corner[0].any() and not corner[:, 0].any()
    assert torch.equal(feather(Rect(0, 0, 9, 7), (9, 7), 1.0), torch.ones(9, 7))


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 0.99), st.floats(0, 0.99), st.floats(0.001, 1), st.floats(0.001, 1), lengths, lengths)
def test_fractions_become_cells_inside_the_canvas_that_touch_the_rectangle(x, y, w, h, height, width):
    rect = Rect.of_fractions(x, y, w, h, (height, width))
    axes = (y, h, rect.top, rect.height, height), (x, w, rect.left, rect.width, width)
    for start, length, first, count, total in axes:
        assert 0 <= first < total and first <= start * total + 1e-6
        assert first == pytest.approx(start * total, abs=1 + 1e-6)
        assert 1 <= count <= total - first and count >= min(length * total - 1e-6, total - first)


def test_fractions_that_mean_whole_cells_give_them():
    assert Rect.of_fractions(0.29, 0.1, 0.1, 0.3, (30, 100)) == Rect(3, 29, 9, 10)
    assert Rect.of_fractions(0, 0, 1, 1, (33, 47)) == Rect(0, 0, 33, 47)


@pytest.mark.parametrize("count, size, lengths", [(10, 4, [3, 3, 4]), (9, 4, [3, 3, 3]), (4, 4, [4]), (0, 4, [])])
def test_batches_are_few_and_equal(count, size, lengths):
    found = list(batches(range(count), size))
    assert sorted(map(len, found)) == lengths and [i for batch in found for i in batch] == list(range(count))
