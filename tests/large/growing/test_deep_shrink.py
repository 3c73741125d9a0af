from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from diffusers import ControlNetModel

from sd_hyena.errors import BadInput
from sd_hyena.large.growing.deep_shrink import DEFAULTS, deep_shrink
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.sites import find_sites
from sd_hyena.students.swap import swapped
from tests.gate import gated
from tests.large.growing.by_hand import controlnet_by_hand, unet_by_hand
from tests.large.growing.conftest import TEXT, latents, predict, small_unet, state_of


@pytest.mark.parametrize(
    "size, block, after_skip",
    [
        *(((35, 27), 3, True), ((35, 27), 1, True), ((16, 24), 3, False), ((16, 24), 8, True)),
        *gated([((16, 24), 3, True), ((16, 24), 1, True), ((35, 27), 3, False), ((35, 27), 8, True)]),
    ],
)
def test_a_prediction_is_that_of_a_unet_written_out_whose_maps_are_halved_behind_a_block(some, size, block, after_skip):
    x = latents(*size)
    with deep_shrink(some, block=block, after_skip=after_skip):
        ours = predict(some, x)
    with torch.no_grad():
        theirs = unet_by_hand(some.unet, x, 900.0, TEXT, some.added, shrink=(block, 2, after_skip))
    assert torch.allclose(ours, theirs, atol=1e-10)
    assert (ours - predict(some, x)).abs().max() > 1e-6


def test_a_factor_need_not_be_whole(some):
    x = latents(35, 27, 1)
    with deep_shrink(some, factor=2.7):
        ours = predict(some, x)
    added = {name: value[:1] for name, value in (some.added or {}).items()}
    with torch.no_grad():
        theirs = unet_by_hand(some.unet, x, 900.0, TEXT[:1], added, shrink=(3, 2.7, True))
    assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("timestep, acts", [(999, True), (651, True), (650, False), (1, False)])
def test_it_ends_where_its_share_of_the_schedule_is_done_and_is_then_the_plain_call_bit_for_bit(some, timestep, acts):
    x = latents(20, 12)
    plain = predict(some, x, timestep)
    with deep_shrink(some):
        assert torch.equal(predict(some, x, timestep), plain) != acts
    with deep_shrink(some, factor=1):
        assert torch.equal(predict(some, x, timestep), plain)


def test_an_error_within_leaves_nothing_behind_and_the_next_call_is_the_old_one_bit_for_bit(some):
    x, before = latents(12, 20), state_of(some.unet)
    plain = predict(some, x)
    with pytest.raises(ZeroDivisionError), deep_shrink(some, block=2):
        predict(some, x)
        raise ZeroDivisionError
    assert state_of(some.unet) == before and torch.equal(predict(some, x), plain)
    with pytest.raises(RuntimeError), deep_shrink(some):
        predict(some, x, encoder_attention_mask=torch.ones(3, 7))
    assert state_of(some.unet) == before and torch.equal(predict(some, x), plain)


def test_two_may_be_nested_and_the_inner_one_goes_first(some):
    x = latents(24, 16)
    with deep_shrink(some, block=3, end=0.5), deep_shrink(some, block=6, end=0.2):
        deep = predict(some, x)
    with deep_shrink(some, block=3, end=0.5):
        one = predict(some, x)
    assert not torch.equal(one, deep) and deep.shape == one.shape == x.shape


class Recorder(torch.nn.Module):
    """A student that answers with its site's attention and keeps the grid that it was told."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.met = [attention], []

    def forward(self, x, projections, size):
        assert x.shape[1] == size[0] * size[1]
        self.met.append(size)
        return self.attention[0](x)


@pytest.mark.parametrize("students_first", [True, False])
def test_students_are_told_the_smaller_grid_wherever_they_are_swapped_in(sd, students_first):
    sites, x = find_sites(sd.unet), latents(35, 27)
    students = {site.name: Recorder(sd.unet.get_submodule(site.name)) for site in sites}
    with deep_shrink(sd, block=3):
        attended = predict(sd, x)
    blocks = [lambda: swapped(sd.unet, students), lambda: deep_shrink(sd, block=3)]
    with ExitStack() as stack:
        for block in blocks if students_first else reversed(blocks):
            stack.enter_context(block())
        assert torch.equal(predict(sd, x), attended)
    met = {site.short: students[site.name].met for site in sites}
    assert met["IN01"] == met["OUT08"] == [(35, 27)]
    assert met["IN04"] == met["IN05"] == met["OUT03"] == met["OUT04"] == [(9, 7)]
    assert met["OUT05"] == [(18, 14)]  # joins the map of the downsampler, which keeps its size
    assert met["M00"] == [(5, 4)]


@pytest.fixture
def with_controlnet(sd):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        net = ControlNetModel.from_unet(sd.unet, conditioning_embedding_out_channels=(16, 16, 16, 16)).eval().double()
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            torch.nn.init.normal_(layer.weight, std=0.3)
    before = state_of(net)
    yield SimpleNamespace(**vars(sd), controlnet=net)
    assert state_of(net) == before


HINT = torch.rand(2, 3, 8 * 18, 8 * 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def controlled(pipe, x):
    down, middle = pipe.controlnet(x, 900.0, TEXT, controlnet_cond=HINT, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}


def test_the_maps_of_a_controlnet_are_made_smaller_with_those_of_the_unet(with_controlnet):
    pipe, x = with_controlnet, latents(18, 13)
    with torch.no_grad():
        with deep_shrink(pipe, block=2):
            ours = predict(pipe, x, **controlled(pipe, x))
        shrink = {"shrink": (2, 2, True)}
        residuals = controlnet_by_hand(pipe.controlnet, x, 900.0, TEXT, HINT, **shrink)
        theirs = unet_by_hand(pipe.unet, x, 900.0, TEXT, residuals=residuals, **shrink)
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_maps_that_cannot_fit_are_refused_in_a_line_that_says_what_to_do(with_controlnet):
    pipe, x = with_controlnet, latents(18, 13)
    with torch.no_grad():
        residuals = controlled(pipe, x)
    alone = SimpleNamespace(**vars(pipe) | {"controlnet": None})
    with pytest.raises(BadInput, match="give the pipeline the ControlNet itself"), deep_shrink(alone):
        predict(alone, x, **residuals)
    with pytest.raises(BadInput, match="T2I-Adapter"), deep_shrink(alone):
        predict(alone, x, down_intrablock_additional_residuals=[torch.zeros(2, 8, 18, 13)])
    with deep_shrink(alone):
        assert torch.isfinite(predict(alone, x, 100, **residuals)).all()  # it is over


@pytest.mark.parametrize("tiles_first", [True, False])
def test_within_tiles_each_tile_is_a_canvas_of_its_own_in_whichever_order_the_two_are_entered(small, tiles_first):
    pipe, x = small["sd"], latents(16, 16)
    blocks = [lambda: tiled_diffusion(pipe, tile_width=8, tile_height=8, overlap=0, weights="uniform")]
    blocks.append(lambda: deep_shrink(pipe))
    with ExitStack() as stack:
        for block in blocks if tiles_first else reversed(blocks):
            stack.enter_context(block())
        ours = predict(pipe, x)
    for top in (0, 8):
        for left in (0, 8):
            part = x[..., top : top + 8, left : left + 8]
            with torch.no_grad():
                theirs = unet_by_hand(pipe.unet, part, 900.0, TEXT, shrink=(3, 2, True))
            assert torch.allclose(ours[..., top : top + 8, left : left + 8], theirs, atol=1e-5)


@pytest.mark.parametrize("tiles_first", [True, False])
@pytest.mark.parametrize("own, factor", [(8, None), (4, 2), (2, 4)])
def test_a_tile_is_made_smaller_by_its_own_size_and_not_by_the_canvas_s(small, tiles_first, own, factor):
    pipe, x = small["sd"], latents(32, 16)
    blocks = [lambda: tiled_diffusion(pipe, tile_width=8, tile_height=8, overlap=0, weights="uniform")]
    blocks.append(lambda: deep_shrink(pipe, own=own))
    with ExitStack() as stack:
        for block in blocks if tiles_first else reversed(blocks):
            stack.enter_context(block())
        ours = predict(pipe, x)
    part = x[..., 8:16, :8]
    with torch.no_grad():
        changes = {"shrink": (3, factor, True)} if factor else {}
        theirs = unet_by_hand(pipe.unet, part, 900.0, TEXT, **changes)
    assert torch.allclose(ours[..., 8:16, :8], theirs, atol=1e-5)


def test_a_pipeline_draws_with_samplers_that_count_in_fractions_and_that_ask_twice_a_step(pipe):
    scheduler, options = pipe.scheduler, dict(num_inference_steps=2, output_type="latent", width=72, height=56)
    draw = lambda: pipe("a red circle", generator=torch.Generator().manual_seed(0), **options).images
    try:
        for name in ("euler", "heun"):
            set_scheduler(pipe, name)
            plain = draw()
            with deep_shrink(pipe, end=1.0):
                shrunk = draw()
            assert torch.isfinite(shrunk).all() and not torch.equal(plain, shrunk), name
    finally:
        pipe.scheduler = scheduler


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"block": 0}, "from 1"),
        ({"block": 9}, "1 to 8"),
        ({"block": 2.0}, "number"),
        ({"factor": 0.5}, "1 to 16"),
        ({"start": 0.5, "end": 0.4}, "start <= end"),
        ({"end": 1.1}, "start <= end"),
        ({"mode": "bislerp"}, "use bicubic"),
        ({"own": -1}, "own side"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_changed(sd, options, rule):
    before = state_of(sd.unet)
    with pytest.raises(BadInput, match=rule), deep_shrink(sd, **options):
        pass
    assert state_of(sd.unet) == before


def test_what_is_no_unet_is_refused(sd):
    stranger = SimpleNamespace(unet=torch.nn.Linear(2, 2), scheduler=sd.scheduler)
    with pytest.raises(BadInput, match="give a pipeline of SD"), deep_shrink(stranger):
        pass


def test_the_defaults_are_the_peers():
    assert (DEFAULTS["block"], DEFAULTS["factor"], DEFAULTS["start"], DEFAULTS["end"]) == (3, 2.0, 0.0, 0.35)
    assert DEFAULTS["after_skip"] and DEFAULTS["mode"] == "bicubic"


def test_half_precision_stays_half(sd):
    pipe = SimpleNamespace(unet=small_unet(False).bfloat16(), scheduler=sd.scheduler, added=None)
    with deep_shrink(pipe), torch.no_grad():
        y = pipe.unet(latents(16, 16).bfloat16(), 900, TEXT.bfloat16()).sample
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()
