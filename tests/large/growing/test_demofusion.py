import inspect
import math
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.growing.demofusion import blurred, demofusion, share, taken
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.options.sampler import SAMPLERS, set_scheduler
from tests.gate import gated
from tests.large.growing.conftest import TEXT, latents, predict, state_of
from tests.large.growing.test_deep_shrink import HINT, with_controlnet  # noqa: F401


def blurred_by_hand(x, s, sigma):
    """The definition: a Gaussian over 2s-1 cells on each side, zeros beyond the border, then each image's own moments."""
    reach, (height, width) = s - 1, x.shape[2:]
    weight = {d: math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)}
    around, y = torch.nn.functional.pad(x, (reach,) * 4), torch.zeros_like(x)
    for dy in weight:
        for dx in weight:
            beside = around[..., reach + dy : reach + dy + height, reach + dx : reach + dx + width]
            y += weight[dy] * weight[dx] / sum(weight.values()) ** 2 * beside
    for image, own in zip(y, x, strict=True):
        image.copy_((image - image.mean()) / image.std() * own.std() + own.mean())
    return y


@pytest.mark.parametrize("s, sigma", [(2, 1.0), (3, 0.4), (4, 2.0)])
def test_a_blur_is_its_definition(s, sigma):
    x = latents(9, 6)
    assert torch.allclose(blurred(x, 2 * s - 1, sigma), blurred_by_hand(x, s, sigma), atol=1e-12)
    assert torch.allclose(blurred(x, 2 * s - 1, 0.01), x, atol=1e-12)  # at the end nothing is blurred


def test_a_blur_that_goes_round_moves_with_the_canvas():
    x = latents(9, 6)
    moved = blurred(x.roll((4, 2), (2, 3)), 5, 1.3, circular=True)
    assert torch.allclose(moved, blurred(x, 5, 1.3, circular=True).roll((4, 2), (2, 3)), atol=1e-12)


@pytest.mark.parametrize("size, s", [((35, 27), 2), ((16, 12), 3)])
def test_a_prediction_is_mixed_with_that_of_every_sample_put_back_where_it_was_taken(some, size, s):
    x, timestep = latents(*size), 700.0
    with demofusion(some, dilation=s, c1=math.inf):
        ours = predict(some, x, timestep)
    f = (1 + math.cos(math.pi * 0.3)) / 2
    soft = blurred_by_hand(x, s, 0.99 * f + 0.01)
    distant = torch.full_like(x, torch.nan)
    for a in range(s):
        for b in range(s):
            part = soft[..., a::s, b::s]
            pipe = SimpleNamespace(**vars(some))
            if some.added:
                time_ids = some.added["time_ids"].clone()
                time_ids[:, 4:] = torch.tensor([8.0 * part.shape[2], 8.0 * part.shape[3]])
                pipe.added = some.added | {"time_ids": time_ids}
            distant[..., a::s, b::s] = predict(pipe, part, timestep)
    theirs = (1 - f) * predict(some, x, timestep) + f * distant
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_samples_share_calls_of_the_unet_and_whoever_shares_them_out_gets_all(sd):
    x, met = latents(9, 7), []

    def shared_out(do, work):
        met.extend(work)
        return map(do, work)

    with demofusion(sd, dilation=3, c1=math.inf, tile_batch_size=1):
        one_by_one = predict(sd, x)
    with demofusion(sd, dilation=3, c1=math.inf, tile_batch_size=4, map=shared_out):
        ours = predict(sd, x)
    assert torch.allclose(ours, one_by_one, atol=1e-10)
    assert sorted(offset for batch in met for offset in batch) == [(a, b) for a in range(3) for b in range(3)]
    assert max(map(len, met)) > 1


def by_the_paper(pipe, picture, noise, steps, s, c1, c2, c3, sigma, guidance):
    """DemoFusion's loop with two paths that are stepped each by itself and mixed afterwards, DDIM."""
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    text = torch.cat(pipe.encode_prompt("a red circle", "cpu", 1, True)[::-1])

    def stepped(seen, x, t):
        rows = torch.cat([seen, seen])
        negative, positive = pipe.unet(rows, t, text.repeat_interleave(len(seen), 0)).sample.chunk(2)
        return scheduler.step(negative + guidance * (positive - negative), t, x).prev_sample

    x = None
    for t in scheduler.timesteps:
        f = 0.5 * (1 + math.cos(math.pi * (1000 - float(t)) / 1000))
        a = scheduler.alphas_cumprod[t]
        noised = a.sqrt() * picture + (1 - a).sqrt() * noise
        x = noised if x is None else (1 - f**c1) * x + f**c1 * noised
        soft = blurred_by_hand(x, s, sigma * (0.99 * f**c3 + 0.01))
        distant = torch.zeros_like(x)
        for top in range(s):
            for left in range(s):
                distant[..., top::s, left::s] = stepped(soft[..., top::s, left::s], x[..., top::s, left::s], t)
        x = (1 - f**c2) * stepped(x, x, t) + f**c2 * distant
    return x


def again(pipe, picture, **options):
    """The picture drawn again at its size, two images of one prompt."""
    drawing = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    drawing.set_progress_bar_config(disable=True)
    sources = [torch.Generator().manual_seed(seed) for seed in range(len(picture))]
    common = dict(image=picture, strength=1.0, num_inference_steps=3, guidance_scale=3.0, output_type="latent")
    common |= dict(generator=sources, num_images_per_prompt=len(picture))
    with torch.no_grad(), demofusion(drawing, **options) if options else ExitStack():
        return drawing("a red circle", **common).images


def noise_of(picture):
    sources = [torch.Generator().manual_seed(seed) for seed in range(len(picture))]
    return torch.cat([torch.randn(1, *picture.shape[1:], generator=source) for source in sources])


@torch.no_grad()
def test_a_picture_is_drawn_as_in_the_papers_own_loop(pipe):
    picture = latents(7, 5).float()
    ours = again(pipe, picture, dilation=2, c1=3, c2=1, c3=2, sigma=1.5)
    theirs = by_the_paper(pipe, picture, noise_of(picture), 3, 2, 3, 1, 2, 1.5, 3.0)
    assert torch.allclose(ours, theirs, atol=2e-4 * theirs.abs().max().item())
    assert (ours - again(pipe, picture)).abs().max() > 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_with_the_residual_in_full_every_sampler_shows_the_unet_the_noised_picture(pipe, name):
    scheduler, picture, seen = pipe.scheduler, latents(9, 7).float(), []
    noise, alphas = noise_of(picture), scheduler.alphas_cumprod

    def forward(sample, timestep, *args, **kwargs):
        seen.append((float(timestep), sample[: len(picture)]))
        return (0.1 * sample,)

    ours = type(pipe.unet).forward.__get__(pipe.unet)
    forward.__signature__ = inspect.signature(ours)
    try:
        set_scheduler(pipe, name)
        before = dict(vars(pipe.scheduler))
        with replaced(pipe.unet, "forward", forward):
            again(pipe, picture, c1=0, c2=math.inf)
        assert vars(pipe.scheduler).keys() >= before.keys() and "step" not in vars(pipe.scheduler)
        assert getattr(pipe.scheduler, "disable_corrector", 0) is before.get("disable_corrector", 0)
    finally:
        pipe.scheduler = scheduler
    assert len(seen) >= 3 and len({t for t, _ in seen}) == 3
    for t, x in seen:
        a = alphas[round(t)]
        assert torch.allclose(x, a.sqrt() * picture + (1 - a).sqrt() * noise, atol=2e-3), t


@torch.no_grad()
def test_where_no_part_counts_it_is_the_plain_call_bit_for_bit_and_nothing_stays(pipe):
    picture, before = latents(5, 4).float(), (state_of(pipe.unet), sorted(vars(pipe.scheduler)))
    plain = again(pipe, picture)
    assert torch.equal(again(pipe, picture, c1=math.inf, c2=math.inf), plain)
    assert torch.equal(again(pipe, picture, c1=math.inf, dilation=1), plain)
    with pytest.raises(ZeroDivisionError), demofusion(pipe):
        assert "step" in vars(pipe.scheduler)
        raise ZeroDivisionError
    assert (state_of(pipe.unet), sorted(vars(pipe.scheduler))) == before
    assert torch.equal(again(pipe, picture), plain)


def test_a_part_counts_all_the_time_or_never_or_as_its_power_says():
    assert [share(done, 0) for done in (0, 0.5, 1)] == [1, 1, 1]
    assert [share(done, math.inf) for done in (0, 0.5, 1)] == [0, 0, 0]
    assert share(0.5, 3) == pytest.approx(0.125) and share(0, 3) == 1 and share(1, 3) == pytest.approx(0)


def residuals_of(controlnet, x, hint, guess):
    """A ControlNet's, in guess mode of the latter half of the rows alone, zeros for the others, as pipelines do it."""
    first = len(x) // 2 if guess else 0
    down, middle = controlnet(x[first:], 900.0, TEXT[first:], controlnet_cond=hint[first:], return_dict=False)
    before = lambda y: torch.cat([torch.zeros_like(y), y]) if guess else y
    return {
        "down_block_additional_residuals": [before(y) for y in down],
        "mid_block_additional_residual": before(middle),
    }


@pytest.mark.parametrize("tiles, guess", [(False, False), *gated([(True, False), (False, True)]), (True, True)])
@torch.no_grad()
def test_a_controlnet_sees_each_sample_with_its_hint_at_the_samples_size(with_controlnet, tiles, guess):  # noqa: F811
    pipe, x, f = with_controlnet, latents(18, 13), (1 + math.cos(math.pi * 0.1)) / 2
    with ExitStack() as stack:
        if tiles:  # then the ControlNet waits for its tile
            stack.enter_context(tiled_diffusion(pipe, tile_width=32, tile_height=32))
        stack.enter_context(demofusion(pipe, c1=math.inf))
        ours = predict(pipe, x, **residuals_of(pipe.controlnet, x, HINT, guess))
    soft, distant = blurred_by_hand(x, 2, 0.99 * f + 0.01), torch.empty_like(x)
    for a in range(2):
        for b in range(2):
            part = soft[..., a::2, b::2]
            size = 8 * part.shape[2], 8 * part.shape[3]
            hint = torch.nn.functional.interpolate(HINT, size, mode="bilinear", antialias=True)
            distant[..., a::2, b::2] = predict(pipe, part, **residuals_of(pipe.controlnet, part, hint, guess))
    theirs = (1 - f) * predict(pipe, x, **residuals_of(pipe.controlnet, x, HINT, guess)) + f * distant
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_the_local_path_is_the_unet_in_tiles_and_a_sample_that_fits_a_tile_is_whole(small):
    pipe, x, f = small["sd"], latents(16, 16), (1 + math.cos(math.pi * 0.1)) / 2
    tiles = lambda: tiled_diffusion(pipe, tile_width=8, tile_height=8, jitter=True, seed=3)
    with tiles(), demofusion(pipe, c1=math.inf):
        ours = predict(pipe, x)
    with tiles():
        local = predict(pipe, x)
    soft, distant = blurred_by_hand(x, 2, 0.99 * f + 0.01), torch.empty_like(x)
    for a in range(2):
        for b in range(2):
            distant[..., a::2, b::2] = predict(pipe, soft[..., a::2, b::2])
    assert torch.allclose(ours, (1 - f) * local + f * distant, atol=1e-5)


def test_the_cells_of_a_finer_or_coarser_map_are_those_under_the_sample():
    rows = torch.arange(13.0)[:, None].expand(13, 18)
    assert torch.equal(taken(rows, (1, 0), 2, (13, 18)), rows[1::2, ::2])
    coarse = torch.arange(7.0)[:, None].expand(7, 9)  # one row for two of the canvas
    assert taken(coarse, (0, 0), 2, (13, 18))[:, 0].tolist() == [0, 2, 4, 6]
    fine = torch.arange(26.0)[:, None].expand(26, 36)
    assert taken(fine, (1, 1), 2, (13, 18)).shape == (12, 18)


def test_there_must_be_a_picture_to_start_from(pipe):
    with pytest.raises(BadInput, match="draw a smaller one first"), demofusion(pipe):
        pipe("a red circle", width=64, height=64, num_inference_steps=2, output_type="latent")


@pytest.mark.parametrize(
    "options, rule",
    [
        ({"dilation": 0}, "from 1"),
        ({"dilation": 1.5}, "whole number"),
        ({"c1": -1}, "never"),
        ({"c2": math.nan}, "never"),
        ({"sigma": 0}, "above 0"),
        ({"tile_batch_size": 0}, "from 1"),
    ],
)
def test_options_that_cannot_work_are_refused(sd, options, rule):
    with pytest.raises(BadInput, match=rule), demofusion(sd, **options):
        pass
