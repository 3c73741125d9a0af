"""A picture enlarged in tiles is the picture enlarged whole, in memory that does not grow with it; or Lanczos' alone."""

import math
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.large import tiled_upscaler
from sd_hyena.large.enlargement import enlarge, passes
from sd_hyena.large.tiled_upscaler import bands, upscaled
from sd_hyena.models.upscaler import load_upscaler
from tests.upscalers import compact, esrgan


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth, with edges."""
    noise = np.random.default_rng(seed).integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


class Repeating:
    """Repeats each pixel; keeps the sizes that it sees, and fails where `fails` says so."""

    def __init__(self, scale: int = 2, multiple: int = 1, fails=lambda x: False):
        self.scale, self.multiple, self.fails = scale, multiple, fails
        self.seen: list[tuple[int, int]] = []
        self.working = False

    @contextmanager
    def at_work(self):
        self.working = True
        try:
            yield self._larger
        finally:
            self.working = False

    def _larger(self, x):
        if self.fails(x):
            raise torch.OutOfMemoryError("injected")
        self.seen.append(tuple(x.shape[2:]))
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


def whole(upscaler, pixels: np.ndarray) -> torch.Tensor:
    """The network's own answer to the whole picture, (3, H, W)."""
    with torch.no_grad(), upscaler.at_work() as larger:
        return larger(torch.from_numpy(pixels).movedim(-1, 0)[None].float() / 255)[0]


NETWORKS = {  # with how far it sees, in px
    "ESRGAN, four times": (lambda: esrgan(4), 20),
    "Real-ESRGAN, twice, of unshuffled pixels": (lambda: esrgan(2, shuffle=2), 40),
    "Compact, three times": (lambda: compact(3), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [(75, 131), (160, 49), (33, 34)])
def test_tiles_give_what_the_network_makes_of_the_whole_picture(name, size, spandrel, tmp_path):
    make, reach = NETWORKS[name]
    torch.save(make().state_dict(), tmp_path / "x.pth")
    upscaler = load_upscaler(tmp_path / "x.pth", torch.device("cpu"), torch.float32)
    height, width = size[0] // upscaler.multiple * upscaler.multiple, size[1] // upscaler.multiple * upscaler.multiple
    pixels = picture(height, width)  # else spandrel pads the whole one
    expected, overlap = whole(upscaler, pixels), 4 * reach
    tiled = torch.cat(list(bands(pixels, upscaler, overlap + 32, overlap)), 1)
    assert (tiled - expected).abs().max() <= 1e-4 and expected.std() > 0.02
    bytes_ = upscaled(pixels, upscaler, overlap + 32, overlap)
    assert bytes_.shape == (upscaler.scale * height, upscaler.scale * width, 3) and bytes_.dtype == np.uint8
    assert np.abs(bytes_ / 255 - expected.movedim(0, -1).numpy()).max() <= 0.5 / 255 + 1e-4


def test_tiles_without_a_common_border_would_show(spandrel, tmp_path):
    torch.save(compact(3).state_dict(), tmp_path / "x.pth")
    upscaler = load_upscaler(tmp_path / "x.pth", torch.device("cpu"), torch.float32)
    pixels = picture(75, 64)
    for overlap, shown in ((0, True), (16, False)):
        error = (torch.cat(list(bands(pixels, upscaler, 48, overlap)), 1) - whole(upscaler, pixels)).abs().max()
        assert (error > 1e-3) == shown


@pytest.mark.gate
def test_a_real_dat_differs_in_tiles_by_what_its_windows_do_not_see(dat):
    """It attends in windows across the tile and weighs channels by their mean over it."""
    pixels = picture(32, 48)
    expected = whole(dat, pixels)
    error = (torch.cat(list(bands(pixels, dat, 32, 16)), 1) - expected).abs()
    assert 1e-4 < error.max() < 0.02 and error.square().mean() < 1e-6  # 60 dB


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (17, 16), (97, 33), (200, 130)])
@pytest.mark.parametrize(
    "tile, overlap, scale, multiple", [(32, 16, 2, 1), (64, 32, 3, 4), (48, 200, 1, 1), (64, 32, 4, 64), (40, 0, 2, 24)]
)
def test_every_pixel_is_covered_once_in_all_for_any_size(size, tile, overlap, scale, multiple):
    pixels, network = picture(*size), Repeating(scale, multiple)
    result = upscaled(pixels, network, tile, overlap)
    assert np.array_equal(result, pixels.repeat(scale, 0).repeat(scale, 1))
    assert max(max(seen) for seen in network.seen) <= max(tile, math.lcm(16, multiple))


def test_the_network_sees_no_more_of_a_larger_picture_and_what_is_held_grows_with_its_width_alone():
    largest, tallest = [], []
    for size in ((90, 110), (400, 130), (700, 300)):
        network = Repeating(2)
        found = [band.shape for band in bands(picture(*size), network, 64, 16)]
        largest.append(max(network.seen))
        tallest.append(max(rows for _, rows, _ in found))
        assert sum(rows for _, rows, _ in found) == 2 * size[0]
        assert {columns for _, _, columns in found} == {2 * size[1]}
    assert largest == [(64, 64)] * 3 and max(tallest) <= 2 * 64


def test_where_memory_runs_out_tiles_are_halved_and_below_32_px_it_is_said(capsys):
    pixels = picture(150, 170)
    network = Repeating(fails=lambda x: max(x.shape[2:]) > 40)
    told = []
    result = upscaled(pixels, network, 128, 32, lambda *done: told.append(done))
    assert np.array_equal(result, pixels.repeat(2, 0).repeat(2, 1)) and max(map(max, network.seen)) == 32
    said = capsys.readouterr()
    assert [line.split()[-2] for line in (said.out + said.err).splitlines() if "out of memory" in line] == ["64", "32"]
    assert told[-1][0] == told[-1][1]
    with pytest.raises(torch.OutOfMemoryError):
        upscaled(pixels, Repeating(fails=lambda x: True), 64)
    broken = Repeating()
    broken._larger = lambda x: (_ for _ in ()).throw(RuntimeError("another fault"))
    with pytest.raises(RuntimeError, match="another fault"):
        upscaled(pixels, broken)


def test_it_is_ended_within_a_tile_and_counts_all_of_them():
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done == 5:
            raise Enough

    told, network = [], Repeating()
    with pytest.raises(Enough):
        upscaled(picture(200, 200), network, 64, 32, stop)
    assert [done for done, _ in told] == [1, 2, 3, 4, 5] and len(network.seen) == 5 and not network.working
    told.clear()
    upscaled(picture(200, 200), network, 64, 32, lambda *done: told.append(done))
    assert told == [(i, told[0][1]) for i in range(1, told[0][1] + 1)]


@pytest.mark.parametrize(
    "size, wanted, scale, expected",
    [
        ((64, 64), (64, 64), 4, 0), ((64, 64), (32, 32), 4, 0), ((64, 64), (65, 64), 4, 1), ((64, 64), (256, 256), 4, 1),
        ((64, 64), (257, 256), 4, 2), ((64, 64), (512, 512), 2, 3), ((8, 8), (4096, 4096), 2, 3), ((100, 400), (200, 200), 2, 1),
    ],
)  # fmt: skip
def test_a_model_is_used_until_both_sides_are_large_enough_at_most_three_times(size, wanted, scale, expected):
    assert passes(size, wanted, scale) == expected
    network, told = Repeating(scale), []
    result = enlarge(Image.fromarray(picture(*size[::-1])), wanted, network, lambda *done: told.append(done))
    assert result.size == wanted and result.mode == "RGB"
    assert (len(told) > 0) == (expected > 0) and (not told or told[-1][0] == told[-1][1])
    assert all(a[0] / a[1] < b[0] / b[1] for a, b in pairwise(told))


def test_without_a_model_and_after_one_it_is_lanczos():
    small = Image.fromarray(picture(40, 30))
    assert np.array_equal(
        np.array(enlarge(small, (97, 64))), np.array(small.resize((97, 64), Image.Resampling.LANCZOS))
    )
    by_model = enlarge(small, (45, 60), Repeating(2))
    twice = small.resize((60, 80), Image.Resampling.NEAREST)
    assert np.array_equal(np.array(by_model), np.array(twice.resize((45, 60), Image.Resampling.LANCZOS)))
    assert enlarge(small, (30, 40)) is small


def test_a_side_that_is_large_enough_does_not_grow_beyond_the_scale():
    network = Repeating(4)
    enlarge(Image.fromarray(picture(500, 20)), (200, 60), network)
    assert max(height for height, _ in network.seen) <= 60


def test_tiles_lie_by_cells_of_16_px_so_that_windows_are_the_whole_pictures():
    """Each tile has its own place as its content."""
    found = []

    class Placing(Repeating):
        def _larger(self, x):
            found.append(tuple(round(float(v) * 255) for v in x[0, :2, 0, 0]))
            return super()._larger(x)

    rows, columns = np.mgrid[:150, :200].astype(np.uint8)
    upscaled(np.stack([rows, columns, rows], -1), Placing(), 64, 24)
    assert len(found) > 6 and all(n % tiled_upscaler.CELL == 0 for place in found for n in place)


def test_weights_of_tiles_fade_linearly():
    """Two tiles of different grey meet in a ramp."""

    class Growing(Repeating):
        def _larger(self, x):
            answer = super()._larger(x)
            return torch.full_like(answer, float(len(self.seen) - 1))

    (band,) = bands(np.zeros((32, 96, 3), np.uint8), Growing(1), 64, 32)
    row = band[0, 16]
    assert (row[:40] == 0).all() and (row[56:] == 1).all()
    assert torch.allclose(row[40:56], torch.arange(1, 17) / 17, atol=1e-6)
    assert torch.allclose(band, row.expand_as(band), atol=1e-6)
