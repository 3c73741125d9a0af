"""A picture that grows on several processes."""

import pytest

from sd_hyena.generate import order
from sd_hyena.large.growing.demofusion import _Dilated
from tests.processes.test_group import alone, drawn, pixels, same  # noqa: F401

OWN = 64
GROWN = "-W 104 -H 96 -s 3 -n 1 --tiled_diffusion multidiffusion --tile_width 8 --tile_height 8".split()


@pytest.fixture
def small_model(monkeypatch):
    """The shipped model as if it had been trained at 64 px."""
    monkeypatch.setattr(order, "own_side", lambda _: OWN)


@pytest.mark.gate
@pytest.mark.usefixtures("small_model", "loaded_once")
def test_two_processes_grow_the_picture_of_one_bit_for_bit_and_share_its_dilated_samples(
    tmp_path,
    drawn,  # noqa: F811
    alone,  # noqa: F811
):
    def counted(_rank):
        original = _Dilated._predictions

        def predictions(self, arguments, control, offsets):
            with open("calls", "a") as file:
                file.write("x" * len(offsets))
            return original(self, arguments, control, offsets)

        _Dilated._predictions = predictions

    options = [*GROWN, "--grow", "demofusion"]
    first, second = drawn(2, "two", *options, fault=counted)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert same(pixels(tmp_path / "two"), alone(*options))
    calls = [len((tmp_path / f"two-{rank}" / "calls").read_text()) for rank in range(2)]
    assert min(calls) > 0 and sum(calls) % 4 == 0  # each sample once, by one of them
