"""A circular canvas that is turned gives what it gave, turned: with every method, also where maps change their size."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch.nn import functional as F

from sd_hyena.large.circular import circular_convolutions
from sd_hyena.large.growing.deep_shrink import deep_shrink
from sd_hyena.large.growing.demofusion import demofusion
from sd_hyena.large.growing.diffusehigh import DiffuseHigh, _Held, sharpened
from sd_hyena.large.growing.hidiffusion import hidiffusion
from sd_hyena.large.growing.resized import resized
from sd_hyena.large.noise_inversion import detail
from sd_hyena.large.tiled_vae import tiled_vae
from tests.gate import gated
from tests.large.growing.conftest import latents, predict

TURN = (16, 32)  # of (32, 48) cells; the coarsest map has one cell for 16
CHANGES = {
    "deep_shrink": deep_shrink,
    "hidiffusion": partial(hidiffusion, t1=0.4, t2=0.4, aggressive=0.0),
    "demofusion": partial(demofusion, c1=float("inf")),
}


def turned(x, turn=TURN):
    return torch.roll(x, turn, (-2, -1))


@pytest.mark.parametrize("some", ["sd", *gated(["sdxl"])], indirect=True)
@pytest.mark.parametrize("method", CHANGES)
def test_a_turned_canvas_gives_the_prediction_turned(some, method):
    x, change = latents(32, 48, 1), CHANGES[method]
    with circular_convolutions(some.unet), change(some, circular=True):
        assert torch.allclose(turned(predict(some, x)), predict(some, turned(x)), atol=1e-9)
    with circular_convolutions(some.unet), change(some):
        assert not torch.allclose(turned(predict(some, x)), predict(some, turned(x)), atol=1e-6)


@pytest.mark.parametrize("size, other", [((7, 5), (11, 3)), ((8, 12), (16, 18)), ((1, 4), (3, 9)), ((9, 9), (9, 4))])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear", "area"])
def test_a_circular_map_at_another_size_is_the_middle_of_a_plane_tiled_with_it(size, other, mode):
    x = latents(*size)
    corners = {} if mode == "area" else {"align_corners": False}
    plane = F.interpolate(x.repeat(1, 1, 5, 5), [5 * side for side in other], mode=mode, **corners)
    middle = plane[..., 2 * other[0] : 3 * other[0], 2 * other[1] : 3 * other[1]]
    assert torch.allclose(resized(x, other, mode, circular=True), middle, atol=1e-12)


def test_what_a_picture_is_held_to_goes_round(pipe):
    """DiffuseHigh's picture is sharpened round its borders, and so are the latents that its band is put into."""
    source = torch.Generator().manual_seed(0)
    own, drawn = torch.rand(1, 3, 64, 128, generator=source) * 2 - 1, torch.randn(1, 4, 8, 16, generator=source)
    soft = sharpened(own, 1.5, circular=True)
    assert torch.allclose(turned(soft, (24, 56)), sharpened(turned(own, (24, 56)), 1.5, circular=True), atol=1e-5)
    assert not torch.allclose(turned(sharpened(own)), sharpened(turned(own)), atol=1e-2)
    held = _Held(StableDiffusionImg2ImgPipeline.from_pipe(pipe), DiffuseHigh(circular=True))
    with torch.no_grad(), tiled_vae(pipe.vae, padding_mode="circular"):
        held._picture = own
        before = held._held(drawn)
        held._picture = turned(own, (0, 64))
        assert torch.allclose(turned(before, (0, 8)), held._held(turned(drawn, (0, 8))), atol=1e-3)


@pytest.mark.parametrize("radius", [2, 9])
def test_where_a_circular_picture_is_smooth_is_seen_round_its_borders(radius):
    picture = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(1)) * 0.3
    plane = detail(picture.repeat(1, 1, 5, 5), radius)[..., 24:36, 40:60]
    assert torch.allclose(detail(picture, radius, circular=True), plane, atol=1e-5)
    whole = detail(turned(picture, (5, 11)), radius, circular=True)
    assert torch.allclose(whole, turned(detail(picture, radius, circular=True), (5, 11)), atol=1e-5)


def test_where_a_network_s_convolutions_are_spread_they_pad_by_what_they_see_and_are_as_they_were(small):
    convolution = small["sd"].unet.down_blocks[0].downsamplers[0].conv
    before, seen = dict(vars(convolution)), []
    pipe = SimpleNamespace(**vars(small["sd"]))
    hook = convolution.register_forward_hook(lambda m, args, y: seen.append((args[0], m.padding_mode, y)))
    with circular_convolutions(pipe.unet), hidiffusion(pipe):
        predict(pipe, latents(16, 8, 1))
    hook.remove()
    (x, mode, y), weight = seen[0], convolution.weight
    assert mode == "circular"
    by_hand = convolution.bias[:, None, None] + sum(
        torch.einsum("oi,bihw->bohw", weight[:, :, j, i], torch.roll(x, (2 - 2 * j, 2 - 2 * i), (2, 3))[..., ::4, ::4])
        for j in range(3)
        for i in range(3)
    )
    assert torch.allclose(y, by_hand, atol=1e-10)
    assert {k: v for k, v in vars(convolution).items() if not k.startswith("_forward")} == {
        k: v for k, v in before.items() if not k.startswith("_forward")
    }
