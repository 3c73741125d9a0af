from itertools import combinations, pairwise, product

import numpy as np
import pytest
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.large.bricks import edges, get_bricks, view_bricks, viewBricks

SHAPES = ("brick", "tile", "shifted")
SIZES = [(1, 1), (1, 90), (7, 13), (16, 16), (32, 16), (31, 64), (64, 64), (70, 90), (97, 41), (115, 76)]


def owners(width, height, bricks):
    """Which rectangle each token belongs to; -1 for none. Fails where two overlap or one leaves the grid."""
    owner = np.full((height, width), -1)
    for n, r in enumerate(bricks):
        part = owner[r.top : r.top + r.height, r.left : r.left + r.width]
        assert r.top >= 0 and r.left >= 0 and part.shape == (r.height, r.width) and part.size and (part == -1).all()
        part[:] = n
    return owner


def seams(line):
    return {x for x in range(1, len(line)) if line[x] != line[x - 1]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slices", [(8, 8), (9, 16), (16, 11), (64, 64)])
def test_every_tiling_covers_each_token_once_with_no_rectangle_larger_than_named(shape, slices):
    x, y = slices
    for (width, height), index in product(SIZES, range(4)):
        bricks = get_bricks(width, height, index, x, y, shape)
        assert (owners(width, height, bricks) >= 0).all()
        across, down = {"brick": [(2 * x, y), (x, 2 * y)][index % 2]}.get(shape, (x, y))
        assert max(r.width for r in bricks) <= across and max(r.height for r in bricks) <= down


@pytest.mark.parametrize("shape", ["brick", "shifted"])
@pytest.mark.parametrize("s", [8, 13])
def test_the_four_tilings_differ_for_every_grid_larger_than_a_brick_even_where_it_divides_evenly(shape, s):
    for width, height in product((1, s, s + 1, 2 * s + 1, 4 * s, 5 * s + 3, 8 * s), repeat=2):
        tilings = [frozenset(get_bricks(width, height, k, s, s, shape)) for k in range(4)]
        for one, other in combinations(tilings, 2):
            assert one != other or len(one) == 1, (width, height)
    assert get_bricks(9 * s, 5 * s, 6, s, s, shape) == get_bricks(9 * s, 5 * s, 2, s, s, shape)


def test_courses_are_staggered_always_also_with_two_bricks_in_a_row():
    for (width, height), index in product([*SIZES, (256, 128), (128, 256), (65, 65), (129, 33)], range(4)):
        owner = owners(width, height, get_bricks(width, height, index, 16, 16))
        owner = owner if index % 2 == 0 else owner.T  # tall bricks stand in columns
        crossed = 0
        for above, below in pairwise(owner):
            if (above != below).all():
                assert not seams(above) & seams(below)
                crossed += bool(seams(above))
        assert crossed or owner.shape[0] <= 16 or owner.shape[1] <= 32
    rows = owners(256, 128, get_bricks(256, 128, 0, 64, 64))
    assert (seams(rows[0]), seams(rows[64])) == ({128}, {64, 192})


def test_shifted_windows_move_by_a_quarter_each_time_and_tiles_stand_still():
    columns = [seams(owners(64, 64, get_bricks(64, 64, k, 32, 16, "shifted"))[0]) for k in range(4)]
    rows = [seams(owners(64, 64, get_bricks(64, 64, k, 32, 16, "shifted"))[:, 0]) for k in range(4)]
    assert columns == [{32}, {8, 40}, {16, 48}, {24, 56}]
    assert rows == [{16, 32, 48}, {4, 20, 36, 52}, {8, 24, 40, 56}, {12, 28, 44, 60}]
    assert len({tuple(get_bricks(64, 64, k, 32, 16, "tile")) for k in range(8)}) == 1


def test_the_pieces_of_a_side_are_equal_to_one_token_for_every_length():
    for length, count in product(range(1, 130), range(1, 9)):
        if count <= length:
            pieces = np.diff(edges(length, count))
            assert len(pieces) == count and pieces.sum() == length and np.ptp(pieces) <= 1
    assert edges(100, 1, 3) == [0, 100] and edges(128, 2, 1) == [0, 16, 80, 128]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_picture_shows_each_rectangle_in_a_colour_of_its_own(tmp_path, shape):
    picture = view_bricks(520, 312, 16, 8, tmp_path / "bricks.png", attn_shape=shape)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "bricks.png")), np.asarray(picture))
    assert [path.name for path in tmp_path.iterdir()] == ["bricks.png"] and viewBricks is view_bricks
    pixels, scale = np.asarray(picture).astype(int) @ [1, 256, 65536], 512 // 65
    for index in range(4):
        x0, y0 = (index % 2) * (65 * scale + 8), (index // 2) * (39 * scale + 8)
        shown = pixels[y0 : y0 + 39 * scale : scale, x0 : x0 + 65 * scale : scale]
        owner = owners(65, 39, get_bricks(65, 39, index, 16, 8, shape))
        pairs = set(zip(owner.flat, shown.flat, strict=True))
        assert len(pairs) == owner.max() + 1 == len({colour for _, colour in pairs})


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(shape="hexagon"), "attn_shape='hexagon'.*brick, tile, shifted"),
        (dict(slice_x=0), "attn_slice_x=0 must be at least 8"),
        (dict(slice_y=7), "attn_slice_y=7 must be at least 8"),
    ],
)
def test_what_is_no_tiling_is_refused_in_one_line(given, words):
    with pytest.raises(BadInput, match=words) as raised:
        get_bricks(64, 64, 0, **given)
    assert "\n" not in str(raised.value)
    with pytest.raises(BadInput, match="4x512 is too small"):
        view_bricks(4, 512)
