import math
from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from sd_hyena.large.growing.stages import sizes, times

sides = st.integers(8, 1024).map(lambda cells: 8 * cells)


@given(sides, sides, st.sampled_from([256, 512, 768, 1024]))
@example(1024, 1024, 256)
@example(768, 512, 256)
@example(8192, 64, 1024)
def test_stages_grow_from_the_model_s_own_area_to_the_canvas_by_factors_of_at_most_two_in_its_shape(width, height, own):
    found = sizes((width, height), own)
    assert found[-1] == (width, height) and all(side % 8 == 0 and side >= 64 for size in found for side in size)
    assert len(found) == 1 or times((width, height), own) > 1
    for (w, h), (w2, h2) in pairwise(found):
        assert w <= w2 and h <= h2 and (w, h) != (w2, h2)
        assert w2 <= 2 * (w + 4) + 4 and h2 <= 2 * (h + 4) + 4  # each is rounded to whole cells
    if len(found) > 1 and min(width, height) * own / math.sqrt(width * height) >= 64:
        assert all(abs(side - wanted * own / math.sqrt(width * height)) <= 4 + 1e-6
                   for side, wanted in zip(found[0], (width, height), strict=True))  # fmt: skip


def test_four_times_the_side_are_three_stages_and_the_model_s_own_canvas_is_one():
    assert sizes((1024, 1024), 256) == [(256, 256), (512, 512), (1024, 1024)]
    assert sizes((256, 256), 256) == [(256, 256)] and sizes((512, 128), 256) == [(512, 128)]
    assert sizes((768, 512), 256) == [(312, 208), (488, 328), (768, 512)]
