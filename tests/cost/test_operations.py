"""Operations are counted as a person would count them."""

import math
from functools import partial

import pytest
import torch

from sd_hyena.cost.landmark_count import count_for
from sd_hyena.cost.operations import attention_flops, fake_block, flops, folded_flops, student_flops, unet_flops
from sd_hyena.distil.selection import Candidate, choose, table
from sd_hyena.errors import BadInput
from sd_hyena.sites import Site, find_sites
from sd_hyena.students.student import StudentSpec
from sd_hyena.students.untrained import Untrained, untrained_spec


def spec(operator, d=16, size=None, **options):
    return StudentSpec("s", "S", d, operator, options, size)


def test_a_windowed_student_costs_its_projections_their_change_and_the_windows():
    """Eight linear layers of 2 L d^2 and, for each token, 64 scores and their use."""
    d, size = 16, (16, 24)
    tokens = size[0] * size[1]
    expected = 8 * 2 * tokens * d * d + 2 * 2 * tokens * 64 * d
    assert student_flops(spec("windows", d, heads=2, window=8), size) == expected


@pytest.mark.parametrize("operator", ["hyena2d", "clusters", "windows", "safari"])
def test_a_block_is_counted_as_generation_computes_it(operator):
    """Of real tensors, where the changes of the projections are added to their weights; and without any change."""
    options = {} if operator == "safari" else {"heads": 2} | ({"window": 4} if operator == "windows" else {})
    spec = StudentSpec("s", "S", 16, operator, options, (20, 20) if operator == "safari" else None)
    student, projections, x = fake_block(spec, (20, 20))
    assert folded_flops(spec, (20, 20)) == flops(lambda: student.requires_grad_(False)(x, projections, (20, 20)))
    if operator in ("clusters", "windows"):
        untrained = Untrained(spec)
        assert folded_flops(spec, (20, 20)) == flops(lambda: untrained(x, projections, (20, 20)))


def test_landmarks_are_the_most_of_a_ladder_that_cost_less_than_attention():
    """At 512 px level 1 of SD 1.5 is cheaper with 256, by a hundredth; the shipped model's level 0 at 256 px with 128."""
    tiny, level1 = Site("s", "S", 32, 2, 0), Site("s", "S", 640, 8, 1)
    assert count_for(level1, (32, 32)) == 256 and count_for(tiny, (32, 32)) == 128
    assert count_for(tiny, (16, 16)) is None and count_for(tiny, (64, 64)) == 256
    for site, side in ((tiny, 32), (level1, 20)):
        _, projections, x = fake_block(untrained_spec(site, 64), (side, side))
        attention = 8 * side**2 * site.channels**2 + 4 * side**4 * site.channels
        blocks = {n: Untrained(untrained_spec(site, n)) for n in (64, 128, 256)}
        less = [n for n, block in blocks.items() if flops(partial(block, x, projections, (side, side))) < attention]
        assert count_for(site, (side, side)) == max(less, default=None)


def test_linear_attention_grows_with_the_tokens_and_attention_with_their_square():
    small, large = (student_flops(spec("linear", heads=2), (n, n)) for n in (16, 64))
    assert large == 16 * small
    site = Site("s", "S", 16, 2, 0)
    quadratic = [attention_flops(site, (n, n)) - 8 * n * n * 16 * 16 for n in (16, 64)]
    assert quadratic[1] == 256 * quadratic[0]


def test_transforms_are_counted_over_the_axes_they_transform():
    """16 channels on 80 x 80 points: the filter in two dimensions; u and its way back along 40 rows that are not zero
    or read, and along 41 columns; 2.5 n log2 n each."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3, 8, 32)
        assert flops(lambda: torch.fft.rfft(x)) == int(2.5 * 3 * 8 * 32 * 5)
        assert flops(lambda: torch.fft.rfft2(x)) == int(2.5 * 3 * 8 * 32 * 8)
        assert flops(lambda: torch.fft.irfft(x[..., :17].to(torch.complex64), 32)) == int(2.5 * 3 * 8 * 32 * 5)
    full, none = (student_flops(spec("hyena2d", heads=2, long=kind), (40, 40)) for kind in ("full", "none"))
    n = 80  # the smallest fast length of 40 + 39
    transforms = 2.5 * 16 * (n * n * math.log2(n * n) + 2 * (40 * n + n * (n // 2 + 1)) * math.log2(n))
    assert full - none == pytest.approx(transforms + 2 * 79 * 79 * (32 * 32 + 32 * 32 + 32 * 16), rel=0.02)


def test_the_unet_costs_what_its_parts_do(unet):
    """Four times the cells: convolutions and projections four times, scores sixteen times."""
    small, large = unet_flops(unet, (16, 16)), unet_flops(unet, (32, 32))
    scores = sum(4 * (h * w) ** 2 * s.channels for s in find_sites(unet) for h, w in [s.size(16, 16)])
    fixed = (
        4 * small - large + 12 * scores
    ) / 3  # what does not grow at all: keys and values of the text, the timestep
    text = sum(2 * 2 * 77 * 96 * s.channels for s in find_sites(unet))
    assert text <= fixed < 1.1 * text


def test_attention_at_2048_px_is_what_stable_diffusion_15_is_known_for(sd15):
    level0 = [site for site in find_sites(sd15) if site.level == 0]
    scores = sum(4 * 65536**2 * site.channels for site in level0)
    assert scores == 5 * 4 * 65536**2 * 320
    assert sum(attention_flops(s, (256, 256)) for s in level0) == scores + 5 * 8 * 65536 * 320**2


CANDIDATES = [Candidate("A", 100, 10, 0.01), Candidate("B", 60, 10, 0.001), Candidate("C", 5, 9, 0.0001)]


def test_sites_are_chosen_by_what_they_save_for_their_error():
    assert [c.short for c in choose(CANDIDATES, 200, max_error=0.1)] == ["B", "A"]  # C would cost more
    assert [c.short for c in choose(CANDIDATES, 200, max_error=0.005)] == ["B"]
    assert [c.short for c in choose(CANDIDATES, 200, budget=1.3)] == ["B"]
    assert [c.short for c in choose(CANDIDATES, 200, budget=3)] == ["B", "A"]
    with pytest.raises(BadInput, match=r"budget=5x cannot be met.*3\.33 times"):
        choose(CANDIDATES, 200, budget=5)
    with pytest.raises(BadInput, match=r"within max_error=0\.005: the 1 sites"):
        choose(CANDIDATES, 200, max_error=0.005, budget=2)
    with pytest.raises(BadInput, match="no site"):
        choose(CANDIDATES, 200, max_error=1e-5)


def test_the_table_says_why_a_site_stays():
    text = table(CANDIDATES, CANDIDATES[1:2], 200)
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["A"].endswith("  attention") and rows["B"].endswith("student") and rows["C"].endswith("cheaper")
    assert "1.33 times cheaper" in text
