import random

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from peft import LoraConfig
from PIL import Image

from examples.tiny_sd.scenes import draw, numbered_scene
from examples.tiny_sd.train import HELD_OUT_SEED
from sd_hyena.errors import BadInput
from sd_hyena.large.regions import Region
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.large.tiling import weights
from sd_hyena.options.sampler import SAMPLERS, set_scheduler
from sd_hyena.students.swap import swapped
from tests.conftest import IN01
from tests.fixtures import controlnet_of
from tests.gate import gated, sampled

TILES = dict(tile_width=16, tile_height=16, overlap=8)
UNIFORM = TILES | dict(weights="uniform")
LEFT = Region(x=0, y=0, w=0.5, h=1, prompt="a red circle", negative_prompt="green")
RIGHT = Region(x=0.5, y=0, w=0.5, h=1, prompt="a blue square")


def picture(pipe, width=192, height=128, prompt="a red circle on blue", seed=0, steps=2, **given):
    """Latents of a picture; 24x16 cells unless told."""
    images = len(prompt) if isinstance(prompt, list) else 1
    given = dict(num_inference_steps=steps, guidance_scale=4.0, output_type="latent") | given
    if "strength" not in given or "mask_image" in given:  # img2img has the size of its image
        given |= dict(width=width, height=height)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(images)]
    return pipe(prompt, generator=generators, **given).images


@torch.no_grad()
def predicted(pipe, latents, text, timestep=500, **given):
    return pipe.unet(latents, torch.tensor(timestep), encoder_hidden_states=text, return_dict=False, **given)[0]


@pytest.fixture
def canvas():
    """Latents of 24x16 cells, two rows, and their text."""
    source = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 24, generator=source), torch.randn(2, 32, 96, generator=source)


@pytest.fixture
def evaluations(pipe):
    """The batch and size of every evaluation of the UNet."""
    seen = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))
    yield seen
    hook.remove()


def with_scheduler(pipe, kind):
    scheduler, pipe.scheduler = pipe.scheduler, kind.from_config(pipe.scheduler.config)
    return scheduler


# One tile, several tiles


@pytest.mark.parametrize(
    "name, options",
    [
        *sampled(((name, {}) for name in SAMPLERS), 3),
        ("ddim", dict(method="mixture", jitter=True)),
        ("ddim", dict(method="spot")),
    ],
)
def test_one_tile_is_bit_equal_to_the_untouched_pipeline(pipe, name, options):
    scheduler = pipe.scheduler
    set_scheduler(pipe, name, False)
    try:
        plain = picture(pipe, 96, 64)
        with tiled_diffusion(pipe, **options):
            assert torch.equal(picture(pipe, 96, 64), plain)
    finally:
        pipe.scheduler = scheduler


@torch.no_grad()
def literal_loop(pipe, kind, prompt, negative, width, height, rects, weight, steps=3, guidance=4.0):
    """MultiDiffusion as it is written: every tile takes its own step of the sampler, the results are averaged."""
    p, n = pipe.encode_prompt(prompt, torch.device("cpu"), 1, True, negative)
    text = torch.cat([n, p])
    schedulers = [kind.from_config(pipe.scheduler.config) for _ in rects]
    for scheduler in schedulers:
        scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    x = x * schedulers[0].init_noise_sigma
    for t in schedulers[0].timesteps:
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for (top, left, h, w), scheduler in zip(rects, schedulers, strict=True):
            part = x[..., top : top + h, left : left + w]
            scaled = scheduler.scale_model_input(torch.cat([part] * 2), t)
            uncond, cond = pipe.unet(scaled, t, encoder_hidden_states=text).sample.chunk(2)
            part = scheduler.step(uncond + guidance * (cond - uncond), t, part).prev_sample
            total[..., top : top + h, left : left + w] += part * weight
            count[..., top : top + h, left : left + w] += weight
        x = total / count
    return x


@pytest.mark.parametrize("kind", [*gated([DDIMScheduler]), EulerDiscreteScheduler])
@pytest.mark.parametrize(
    "options, kernel",
    [
        *gated([(dict(weights="uniform"), "uniform"), (dict(method="multidiffusion"), "cosine")]),
        (dict(method="mixture"), "gaussian"),
    ],
)
def test_the_fused_prediction_is_a_literal_multidiffusion_loop(pipe, kind, options, kernel):
    rects = [(top, left, 16, 16) for top in (0, 4) for left in (0, 7)]  # 20x23 cells: 4 and 7 to go
    scheduler = with_scheduler(pipe, kind)
    try:
        expected = literal_loop(
            pipe, kind, "a red circle on blue", "stripes", 184, 160, rects, weights(kernel, 16, 16, 8), steps=2
        )
        with tiled_diffusion(pipe, **TILES, **options, tile_batch_size=3):
            found = picture(pipe, 184, 160, negative_prompt="stripes", steps=2)
    finally:
        pipe.scheduler = scheduler
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())


@pytest.mark.parametrize("size, calls", [(1, [2, 2]), (4, [4])])
def test_tiles_of_a_batch_share_one_evaluation(pipe, evaluations, canvas, size, calls):
    with tiled_diffusion(pipe, **UNIFORM, tile_batch_size=size):
        found = predicted(pipe, *canvas)
    assert [(batch, *shape) for batch, _, *shape in evaluations] == [(batch, 16, 16) for batch in calls]
    latents, text = canvas
    a, b = (predicted(pipe, latents[..., left : left + 16], text) for left in (0, 8))
    assert torch.allclose(found[..., :8], a[..., :8], atol=1e-5)
    assert torch.allclose(found[..., 8:16], (a[..., 8:] + b[..., :8]) / 2, atol=1e-5)
    assert torch.allclose(found[..., 16:], b[..., 8:], atol=1e-5)


@pytest.mark.parametrize("regions", [*gated([((),)]), (LEFT, RIGHT)])
def test_in_a_batch_of_three_every_picture_is_what_it_is_alone(pipe, regions):
    prompts = ["a red circle on blue", "two white squares on green", "a yellow triangle on black"]
    negatives = ["green", "", "stripes"]
    with tiled_diffusion(pipe, **TILES, regions=regions):
        together = picture(pipe, prompt=prompts, negative_prompt=negatives)
        for i in range(3):
            alone = picture(pipe, prompt=[prompts[i]], negative_prompt=[negatives[i]], seed=i)
            assert torch.allclose(together[i : i + 1], alone, atol=1e-4), i
    assert (together[0] - together[1]).abs().mean() > 0.1


def test_without_guidance_and_with_a_dictionary_asked_for_it_works_as_the_unet_does(pipe, canvas):
    with tiled_diffusion(pipe, **TILES, regions=(LEFT,)):
        assert picture(pipe, guidance_scale=1.0).isfinite().all()
    with tiled_diffusion(pipe, **TILES), torch.no_grad():
        (latents, text) = canvas
        assert torch.equal(pipe.unet(latents, 500, text).sample, predicted(pipe, latents, text))


@pytest.mark.gate
def test_half_precision_is_summed_in_float32_and_given_back_as_it_came(own_pipe, canvas):
    latents, text = (x.to(torch.bfloat16) for x in canvas)
    own_pipe.unet.to(torch.bfloat16)
    tiles = [predicted(own_pipe, latents[..., left : left + 16], text).float() for left in (0, 8)]
    with tiled_diffusion(own_pipe, "mixture", **TILES, tile_batch_size=1):
        found = predicted(own_pipe, latents, text)
    w = weights("gaussian", 16, 16)
    middle = (tiles[0][..., 8:] * w[:, 8:] + tiles[1][..., :8] * w[:, :8]) / (w[:, 8:] + w[:, :8])
    with tiled_diffusion(own_pipe, "mixture", **TILES, tile_batch_size=1, buffer_device="cpu"):
        assert torch.equal(predicted(own_pipe, latents, text), found)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found[..., 8:16].float(), middle, rtol=2**-8, atol=1e-5)


# What moves


@pytest.mark.parametrize(
    "options", [*gated([dict(method="spot")]), dict(jitter=True), dict(method="spot", circular=True)]
)
def test_the_same_seed_gives_the_same_picture_and_the_global_random_state_is_left_alone(pipe, options):
    def drawn(seed):
        with tiled_diffusion(pipe, **dict(tile_width=16, tile_height=8, seed=seed) | options):
            return picture(pipe, 160, 96)

    python, state = random.getstate(), torch.get_rng_state()
    first = drawn(3)
    assert torch.equal(drawn(3), first) and not torch.allclose(drawn(4), first, atol=1e-3)
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), state)


def test_spot_lays_its_windows_edge_to_edge_elsewhere_in_every_step(pipe):
    """The latents number their cells, so a window tells where it lies."""
    latents = (torch.arange(16 * 48).view(1, 1, 16, 48) / 512).repeat(1, 4, 1, 1)
    text, windows = torch.randn(1, 32, 96, generator=torch.Generator().manual_seed(1)), []
    hook = pipe.unet.conv_in.register_forward_hook(lambda _, args, __: windows.extend(args[0]))
    origins = []
    try:
        for timestep in (500, 501):
            windows.clear()
            with tiled_diffusion(pipe, "spot", tile_width=16, tile_height=16, circular=True):
                found = predicted(pipe, latents, text, timestep)
            cells = [(512 * window[0]).round().long() for window in windows]
            assert torch.equal(torch.cat([c.flatten() for c in cells]).sort().values, torch.arange(16 * 48))
            origins.append({divmod(c[0, 0].item(), 48) for c in cells})
            expected = torch.empty_like(latents).flatten(2)
            for window, cell in zip(list(windows), cells, strict=True):
                expected[..., cell.flatten()] = predicted(pipe, window[None], text, timestep).flatten(2)
            assert torch.allclose(found.flatten(2), expected, atol=1e-5)
    finally:
        hook.remove()
    assert len(origins[0]) == len(origins[1]) == 3 and not origins[0] & origins[1]


def test_a_circular_canvas_turned_gives_the_prediction_turned(pipe):
    """Tiles 8 apart on 24x16 cells: turning by 8 maps tiles onto tiles."""
    source = torch.Generator().manual_seed(2)
    latents, text = torch.randn(1, 4, 16, 24, generator=source), torch.randn(1, 32, 96, generator=source)
    turned = latents.roll((8, 8), (-2, -1))
    for circular in (True, False):
        with tiled_diffusion(pipe, "mixture", **TILES, circular=circular):
            error = predicted(pipe, turned, text) - predicted(pipe, latents, text).roll((8, 8), (-2, -1))
        assert (error.abs().max() < 1e-4) == circular


def test_start_and_end_are_parts_of_the_noise_schedule(pipe, evaluations, canvas):
    latents, text = canvas
    plain = {t: predicted(pipe, latents, text, t) for t in (999, 700, 300, 0)}
    evaluations.clear()
    with tiled_diffusion(pipe, **TILES, start=0.2, end=0.8):
        whole = {t: torch.equal(predicted(pipe, latents, text, t), plain[t]) for t in plain}
    assert whole == {999: True, 700: False, 300: False, 0: True}
    assert [shape[-1] for shape in evaluations] == [24, 16, 16, 24]


# Exactly as it was


def state_of(pipe):
    """The functions that the parts of a pipeline have of their own, beside those of their classes."""
    owners = [pipe, pipe.unet, pipe.scheduler, *filter(None, [getattr(pipe, "controlnet", None)])]
    return [{k: v for k, v in vars(owner).items() if callable(v) and k not in pipe.components} for owner in owners]


def test_everything_is_restored_after_the_block_after_an_exception_and_when_nested(pipe):
    before, plain = state_of(pipe), picture(pipe, steps=1)
    regions = (Region(x=0, y=0, w=1, h=1, seed=1, prompt="a white square"),)
    with tiled_diffusion(pipe, **TILES, regions=regions):
        outer = picture(pipe, steps=1)
        with pytest.raises(RuntimeError, match="on purpose"), tiled_diffusion(pipe, tile_width=8, tile_height=8):
            assert not torch.allclose(picture(pipe, steps=1), outer, atol=1e-3)
            raise RuntimeError("on purpose")
        assert torch.equal(picture(pipe, steps=1), outer)
    assert state_of(pipe) == before and torch.equal(picture(pipe, steps=1), plain)
    assert not torch.allclose(outer, plain, atol=1e-3)


def test_a_forward_that_somebody_else_put_there_is_used_and_put_back(pipe, canvas):
    def doubled(*args, **kwargs):
        (prediction,) = type(pipe.unet).forward(pipe.unet, *args, **kwargs)
        return (2 * prediction,)

    doubled.__wrapped__ = pipe.unet.forward
    with tiled_diffusion(pipe, **TILES):
        plain = predicted(pipe, *canvas)
    pipe.unet.forward = doubled
    try:
        with tiled_diffusion(pipe, **TILES):
            assert torch.allclose(predicted(pipe, *canvas), 2 * plain, atol=1e-5)
        assert vars(pipe.unet)["forward"] is doubled
    finally:
        del pipe.unet.forward


def test_bad_options_change_nothing(pipe):
    before = state_of(pipe)
    with pytest.raises(BadInput), tiled_diffusion(pipe, regions=(Region(x=0, y=0, w=1, h=1, adapters=("none",)),)):
        pass
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="multi"), "method='multi' is unknown; use multidiffusion, mixture, spot"),
        (dict(tile_width=0), "tile_width=0 must be a whole number from 8"),
        (dict(tile_height=96.0), "tile_height=96.0 must"),
        (dict(tile_width=True), "tile_width=True must"),
        (dict(overlap=96), "overlap=96 must be a whole number below the tile's short side, 96"),
        (dict(tile_width=32, overlap=40), "overlap=40 must .* 32"),
        (dict(overlap=-1), "overlap=-1 must"),
        (dict(tile_batch_size=0), "tile_batch_size=0 must be a whole number from 1"),
        (dict(weights="flat"), "weights='flat' are unknown"),
        (dict(start=0.5, end=0.5), "start=0.5 and end=0.5"),
        (dict(end=1.5), "end=1.5"),
        (dict(seed=None), "seed=None"),
        (dict(buffer_device="nowhere"), "buffer_device='nowhere' cannot be used"),
        (
            dict(regions=[Region(x=0, y=0, w=1, h=1, mask="none.png")]),
            "mask of a region: 'none.png' is no readable image",
        ),
        (dict(regions=[Region(x=0, y=0, w=1, h=1, adapters=("style",))]), "'style' is not loaded; there are none"),
    ],
)
def test_an_option_that_cannot_work_is_one_clear_line(pipe, options, message):
    with pytest.raises(BadInput, match=message) as error, tiled_diffusion(pipe, **options):
        pass
    assert "\n" not in str(error.value)


def test_a_word_that_is_no_option_is_refused(pipe):
    with pytest.raises(TypeError, match="overlapp"), tiled_diffusion(pipe, overlapp=3):
        pass


def test_the_overlap_is_half_a_tile_unless_told(pipe):
    for options, overlap in ((dict(tile_width=32), 16), (dict(method="spot"), 0), ({}, 48), (dict(overlap=8), 8)):
        with tiled_diffusion(pipe, **options) as used:
            assert used.overlap == overlap


# With the rest of the program


def test_a_swapped_student_sees_tiles(pipe, canvas):
    sizes = []

    class Watching(torch.nn.Module):
        def forward(self, x, projections, size):
            sizes.append((len(x), *size))
            return torch.zeros_like(x)

    with swapped(pipe.unet, {IN01: Watching()}), tiled_diffusion(pipe, **TILES, tile_batch_size=2):
        predicted(pipe, *canvas)
    assert sizes == [(4, 16, 16)]


def parts_of(pipe):
    return {name: part for name, part in pipe.components.items() if name != "image_encoder"}


@pytest.fixture(scope="module")
def controlled(shared_pipe):
    """A ControlNet pipeline on the shipped UNet, with a ControlNet whose hint matters."""
    controlnet = controlnet_of(shared_pipe.unet, 0)
    pipe = StableDiffusionControlNetPipeline(
        **parts_of(shared_pipe), controlnet=controlnet, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def as_a_pipeline_calls(pipe, latents, text, hint, guess_mode=False, scale=0.7):
    """The ControlNet first, then the UNet, as diffusers' pipelines do it."""
    t = torch.tensor(400)
    rows = slice(1, None) if guess_mode else slice(None)
    down, mid = pipe.controlnet(
        latents[rows],
        t,
        encoder_hidden_states=text[rows],
        controlnet_cond=hint,
        conditioning_scale=scale,
        guess_mode=guess_mode,
        return_dict=False,
    )
    if guess_mode:
        down = [torch.cat([torch.zeros_like(d), d]) for d in down]
        mid = torch.cat([torch.zeros_like(mid), mid])
    return pipe.unet(
        latents,
        t,
        encoder_hidden_states=text,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
        return_dict=False,
    )[0]


@pytest.mark.parametrize("guess_mode", [False, *gated([True])])
@pytest.mark.parametrize("nets", [*gated([1]), 2])
@pytest.mark.parametrize("size", [*gated([1]), 4])
def test_a_controlnet_is_tiled_with_the_unet_its_hint_cropped_per_tile(controlled, canvas, guess_mode, nets, size):
    latents, text = canvas
    hint, scale = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(3)), 0.7
    single = controlled.controlnet
    hints = [hint] if nets == 1 else [hint, 1 - hint]
    wrapped = (lambda x: x[0]) if nets == 1 else (lambda x: x)
    if nets == 2:
        controlled.controlnet, scale = MultiControlNetModel([single, single]), [0.7, 0.3]
    try:
        tiles = []
        for left in (0, 8):
            crops = wrapped([h[..., 8 * left : 8 * left + 128] for h in hints])
            tiles.append(
                as_a_pipeline_calls(controlled, latents[..., left : left + 16], text, crops, guess_mode, scale)
            )
        with tiled_diffusion(controlled, **UNIFORM, tile_batch_size=size):
            found = as_a_pipeline_calls(controlled, latents, text, wrapped(hints), guess_mode, scale)
        plain = as_a_pipeline_calls(controlled, latents, text, wrapped(hints), guess_mode, scale)
        with tiled_diffusion(controlled):
            assert torch.equal(as_a_pipeline_calls(controlled, latents, text, wrapped(hints), guess_mode, scale), plain)
    finally:
        controlled.controlnet = single
    expected = torch.cat([tiles[0][..., :8], (tiles[0][..., 8:] + tiles[1][..., :8]) / 2, tiles[1][..., 8:]], -1)
    assert torch.allclose(found, expected, atol=2e-5)
    assert (found - predicted_without_hint(controlled, canvas)).abs().max() > 0.05


def predicted_without_hint(controlled, canvas):
    with tiled_diffusion(controlled, **TILES):
        return predicted(controlled, *canvas, timestep=400)


@pytest.mark.parametrize("guess_mode", [*gated([False]), True])
def test_the_controlnet_pipeline_runs_in_tiles_and_its_hint_stays_in_ram_when_asked(controlled, guess_mode):
    before = state_of(controlled)
    hint = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(3))
    given = dict(guess_mode=guess_mode)
    plain = picture(controlled, image=hint, **given)
    with tiled_diffusion(controlled):
        assert torch.equal(picture(controlled, image=hint, **given), plain)
    with tiled_diffusion(controlled, **TILES):
        tiled = picture(controlled, image=hint, **given)
        other = picture(controlled, image=1 - hint, **given)
    with tiled_diffusion(controlled, **TILES, control_tensor_cpu=True):
        assert torch.equal(picture(controlled, image=hint, **given), tiled)
        held = controlled.prepare_image(hint, 192, 128, 1, 1, device="meta", dtype=torch.float32)
        assert held.device.type == "cpu"
    assert state_of(controlled) == before and (tiled - other).abs().mean() > 1e-5 < (tiled - plain).abs().mean()


def test_a_region_s_controlnet_reads_the_region_s_text(controlled):
    hint = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(3))
    whole = Region(x=0, y=0, w=1, h=1, prompt="a red circle on blue", negative_prompt="green")
    plain = picture(controlled, image=hint, negative_prompt="green")
    with tiled_diffusion(controlled, regions=[whole]):
        assert torch.allclose(picture(controlled, prompt="", image=hint), plain, atol=1e-5)


def test_a_control_image_of_another_size_is_one_clear_line(controlled, canvas):
    message = "the control image is 192x136, the picture 192x128"
    with pytest.raises(BadInput, match=message), tiled_diffusion(controlled, **TILES):
        as_a_pipeline_calls(controlled, *canvas, torch.rand(1, 3, 136, 192))
    pipe = StableDiffusionControlNetImg2ImgPipeline(**parts_of(controlled), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 128, 192)
    with tiled_diffusion(pipe, **TILES):
        given = dict(strength=1.0, guidance_scale=1.0)
        assert picture(pipe, image=image, control_image=image, **given).isfinite().all()
        with pytest.raises(BadInput, match="the control image is 128x128"):
            picture(pipe, image=image, control_image=torch.rand(1, 3, 128, 128), **given)


def test_residuals_and_adapter_features_of_the_whole_canvas_are_cropped(pipe, canvas):
    """A T2I-Adapter's features, one a level; tiles at multiples of 8 cells need no rounding."""
    latents, text = canvas
    levels = [torch.randn(2, c, 16 // s, 24 // s) for c, s in ((32, 1), (64, 2), (96, 4), (96, 8))]
    crop = lambda left: [x[..., left * x.shape[-1] // 24 : (left + 16) * x.shape[-1] // 24] for x in levels]
    tiles = [
        predicted(pipe, latents[..., left : left + 16], text, down_intrablock_additional_residuals=crop(left))
        for left in (0, 8)
    ]
    with tiled_diffusion(pipe, **TILES):
        found = predicted(pipe, latents, text, down_intrablock_additional_residuals=list(levels))
    assert torch.allclose(found[..., :8], tiles[0][..., :8], atol=1e-5)
    assert torch.allclose(found[..., 16:], tiles[1][..., 8:], atol=1e-5)
    assert (found - predicted(pipe, latents, text)).abs().max() > 0.1


def test_img2img_and_inpainting_work_in_tiles(pipe):
    image = torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 128, 192)
    mask[..., 96:] = 1
    for kind, given in ((StableDiffusionImg2ImgPipeline, {}), (StableDiffusionInpaintPipeline, dict(mask_image=mask))):
        other = kind(**parts_of(pipe), requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        plain = picture(other, image=image, strength=0.7, steps=2, **given)
        with tiled_diffusion(other):
            assert torch.equal(picture(other, image=image, strength=0.7, steps=2, **given), plain)
        with tiled_diffusion(other, **TILES):
            tiled = picture(other, image=image, strength=0.7, steps=2, **given)
        assert (tiled[..., 13:] - plain[..., 13:]).abs().max() > 1e-3
        assert torch.equal(tiled[..., :11], plain[..., :11]) == bool(given)


def test_a_unet_of_nine_channels_is_tiled_with_its_mask_and_masked_picture(own_pipe, canvas):
    config = dict(own_pipe.unet.config) | {"in_channels": 9}
    torch.manual_seed(0)
    own_pipe.unet = UNet2DConditionModel.from_config(config).eval()
    latents, text = canvas
    nine = torch.cat([latents, latents[:, :1] > 0, latents.flip(1)], 1)
    tiles = [predicted(own_pipe, nine[..., left : left + 16], text) for left in (0, 8)]
    with tiled_diffusion(own_pipe, **TILES):
        found = predicted(own_pipe, nine, text)
    assert found.shape == latents.shape and torch.allclose(found[..., :8], tiles[0][..., :8], atol=1e-5)
    assert torch.allclose(found[..., 16:], tiles[1][..., 8:], atol=1e-5)


def test_an_ip_adapter_s_masks_are_cropped_per_tile(own_pipe, canvas):
    pipe, (latents, text) = own_pipe, canvas
    torch.manual_seed(0)
    names = [n for n in pipe.unet.attn_processors if n.endswith("attn2.processor")]
    hidden = [pipe.unet.get_submodule(n.removesuffix(".processor")).to_k.out_features for n in names]
    pipe.unet._load_ip_adapter_weights(
        [
            {
                "image_proj": {
                    "proj.weight": torch.randn(4 * 96, 24),
                    "proj.bias": torch.zeros(4 * 96),
                    "norm.weight": torch.ones(96),
                    "norm.bias": torch.zeros(96),
                },
                "ip_adapter": {
                    f"{key}.{name}.weight": torch.randn(width, 96) / 8
                    for key, width in zip(range(1, 2 * len(hidden), 2), hidden, strict=True)
                    for name in ("to_k_ip", "to_v_ip")
                },
            }
        ]
    )
    mask = (torch.rand(1, 1, 16, 24) > 0.5).float().repeat_interleave(8, -1).repeat_interleave(8, -2)
    added = {"image_embeds": [torch.randn(2, 1, 24)]}
    given = lambda mask: dict(added_cond_kwargs=added, cross_attention_kwargs={"ip_adapter_masks": mask})
    tiles = [
        predicted(pipe, latents[..., left : left + 16], text, **given([mask[..., 8 * left : 8 * left + 128]]))
        for left in (0, 8)
    ]
    for masks in ([mask], mask):
        for size in (1, 2):
            with tiled_diffusion(pipe, **TILES, tile_batch_size=size):
                found = predicted(pipe, latents, text, **given(masks))
            assert torch.allclose(found[..., :8], tiles[0][..., :8], atol=1e-4)
            assert torch.allclose(found[..., 16:], tiles[1][..., 8:], atol=1e-4)
    assert (tiles[0] - predicted(pipe, latents[..., :16], text, added_cond_kwargs=added)).abs().max() > 1e-2


# Seams


def seam(pictures, tile, overlap, unit):
    """Mean step across the borders of evenly spread tiles, and the 95 % band of the same lines shifted.

    `pictures` is (N, C, H, W) with `unit` rows and columns a cell; tiles begin or end every `tile - overlap` cells. The
    two cells beside a border are left out of the band: a tile's rim belongs to the seam.
    """
    rows = torch.cat([x.float().reshape(-1, x.shape[-1]) for x in (pictures, pictures.mT)])
    steps = rows.diff(dim=-1).abs().mean(0)  # of line i to line i + 1
    period = unit * (tile - overlap)
    lines = torch.arange(period, len(steps) + 1 - period // 2, period)
    mean = lambda shift: steps[lines + shift - 1].mean()
    others = torch.stack([mean(shift) for shift in range(1 - period // 2, period // 2) if abs(shift) > 2 * unit])
    low, high = others.quantile(torch.tensor([0.025, 0.975]))
    return mean(0).item(), low.item(), high.item()


@pytest.mark.parametrize("cells, count", [*gated([(64, 4)]), pytest.param(128, 1, marks=pytest.mark.slow)])
def test_a_prediction_has_no_seam_where_tiles_begin_unless_they_do_not_overlap_or_count_alike(pipe, cells, count):
    """At the first timestep v is, but for its sign, the picture foreseen: smooth, so a jump shows."""
    source = torch.Generator().manual_seed(0)
    latents = torch.randn(count, 4, cells, cells, generator=source)
    prompts = [
        "a red circle on blue",
        "a white square on green",
        "two yellow circles on black",
        "a red square on white",
    ]
    text = pipe.encode_prompt(prompts[:count], torch.device("cpu"), 1, False)[0]
    for options, seen in (
        (dict(method="multidiffusion"), False),
        (dict(method="mixture"), False),
        (dict(weights="uniform"), True),
        (dict(overlap=0), True),
    ):
        with tiled_diffusion(pipe, **dict(tile_width=32, tile_height=32, overlap=16) | options) as used:
            border, low, high = seam(predicted(pipe, latents, text, 999), 32, used.overlap, 1)
        assert (border > high) == seen, (options, border, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("side", [512, 1024])
@pytest.mark.parametrize(
    "options, seen",
    [(dict(overlap=0), True), ({}, False), (dict(method="mixture"), False), (dict(weights="uniform"), True)],
)
def test_sixteen_pictures_show_no_seam_unless_tiles_do_not_overlap_or_count_alike(pipe, options, seen, side):
    """Scenes drawn again, whose shapes lie anywhere; from noise a small model draws one shape in the middle of each tile."""
    again = StableDiffusionImg2ImgPipeline(**parts_of(pipe), requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    scenes = [numbered_scene(HELD_OUT_SEED, i) for i in range(16)]
    with tiled_diffusion(again, **dict(tile_width=32, tile_height=32, overlap=16) | options) as used:
        pictures = [
            picture(
                again,
                prompt=str(scene.caption),
                image=Image.fromarray(draw(scene, side)),
                strength=0.6,
                seed=i,
                steps=10,
                output_type="pt",
            )
            for i, scene in enumerate(scenes)
        ]
    border, low, high = seam(torch.cat(pictures), 32, used.overlap, 8)
    print(f"{side} px, {options}: {border:.4f}, band {low:.4f} to {high:.4f}")
    assert border > high if seen else low <= border <= high


# Regions


def text_of(pipe, prompt, negative=""):
    p, n = pipe.encode_prompt(prompt, torch.device("cpu"), 1, True, negative)
    return torch.cat([n, p])


@pytest.fixture
def regional(pipe, canvas):
    """predict(regions, **options) on the canvas, with "on white" as the picture's prompt; and the UNet on a part."""
    latents = canvas[0][:1].repeat(2, 1, 1, 1)
    main = text_of(pipe, "on white", "stripes")

    def predict(*regions, guidance=4.0, **options):
        with tiled_diffusion(pipe, **UNIFORM | options, regions=regions), torch.no_grad():
            pipe._guidance_scale = guidance
            pipe.encode_prompt("on white", torch.device("cpu"), 1, True, "stripes")
            return predicted(pipe, latents, main)

    def part(left, right, prompt="on white", negative="stripes", top=0, bottom=16):
        return predicted(pipe, latents[..., top:bottom, left:right], text_of(pipe, prompt, negative))

    had = vars(pipe).get("_guidance_scale")
    yield predict, part
    pipe._guidance_scale = had


def close(a, b):
    return torch.allclose(a, b, atol=1e-5)


def test_background_regions_replace_the_tiles_and_are_averaged_where_they_overlap(regional, evaluations):
    predict, part = regional
    wide = Region(x=0, y=0, w=0.75, h=1, prompt="a red circle", negative_prompt="green")
    found = predict(wide, RIGHT)
    assert sorted(evaluations) == [(2, 4, 16, 12), (2, 4, 16, 18)]
    red, blue = part(0, 18, "on white, a red circle", "stripes, green"), part(12, 24, "on white, a blue square")
    assert close(found[..., :12], red[..., :12]) and close(found[..., 18:], blue[..., 6:])
    assert close(found[..., 12:18], (red[..., 12:] + blue[..., :6]) / 2)


def test_cells_without_a_region_are_filled_with_the_picture_s_prompt_or_left_zero(regional, evaluations):
    predict, part = regional
    found = predict(LEFT)
    assert close(found[..., :12], part(0, 12, "on white, a red circle", "stripes, green"))
    both = part(0, 16), part(8, 24)
    assert close(found[..., 16:], both[1][..., 8:])
    assert close(found[..., 12:16], (both[0][..., 12:] + both[1][..., 4:8]) / 2)
    evaluations.clear()
    zero = predict(LEFT, fill_uncovered=False)
    assert not zero[..., 12:].any() and close(zero[..., :12], found[..., :12]) and len(evaluations) == 1
    evaluations.clear()
    predict(Region(x=0, y=0, w=0.2, h=1))
    assert sorted(evaluations) == [(2, 4, 16, 5), (4, 4, 16, 16)]
    evaluations.clear()
    predict(Region(x=0, y=0, w=1, h=1, blend_mode="foreground"))  # opaque everywhere: nothing is left to fill
    assert evaluations == [(2, 4, 16, 24)]


def test_a_background_region_counts_as_much_as_its_mask_says(regional, tmp_path):
    predict, part = regional
    half = torch.zeros(16, 24, dtype=torch.uint8)
    half[:8], half[8:, :12] = 255, 51
    Image.fromarray(half.numpy()).save(tmp_path / "mask.png")
    red = Region(x=0, y=0, w=1, h=1, prompt="a red circle", mask=str(tmp_path / "mask.png"))
    blue = Region(x=0, y=0, w=0.5, h=1, prompt="a blue square")
    found = predict(red, blue)
    a, b = part(0, 24, "on white, a red circle"), part(0, 12, "on white, a blue square")
    assert close(found[..., :8, :12], (a[..., :8, :12] + b[..., :8, :]) / 2) and close(
        found[..., :8, 12:], a[..., :8, 12:]
    )
    assert close(found[..., 8:, :12], (0.2 * a[..., 8:, :12] + b[..., 8:, :]) / 1.2)
    assert close(found[..., 8:, 16:], part(8, 24)[..., 8:, 8:])  # nothing of a region: filled


def test_a_background_that_is_drawn_is_averaged_with_the_regions(regional):
    predict, part = regional
    found, red = predict(LEFT, draw_background=True), part(0, 12, "on white, a red circle", "stripes, green")
    tiles = part(0, 16), part(8, 24)
    assert close(found[..., :8], (red[..., :8] + tiles[0][..., :8]) / 2)
    assert close(found[..., 8:12], (red[..., 8:] + tiles[0][..., 8:12] + tiles[1][..., :4]) / 3)
    assert close(found[..., 16:], tiles[1][..., 8:])


def test_a_foreground_region_covers_the_background_with_a_feathered_edge(regional):
    predict, part = regional
    front = Region(x=0.25, y=0, w=0.5, h=1, prompt="a blue square", blend_mode="foreground", feather_ratio=0.5)
    found = predict(LEFT, RIGHT, front)
    below, blue = predict(LEFT, RIGHT), part(6, 18, "on white, a blue square")
    opacity = torch.tensor([0, 1, 4, 9, 9, 9, 9, 9, 9, 4, 1, 0]) / 9
    assert close(found[..., 6:18], below[..., 6:18] * (1 - opacity) + blue * opacity)
    assert close(found[..., :6], below[..., :6]) and close(found[..., 18:], below[..., 18:])
    bare = predict(front)
    assert close(bare[..., 9:15], blue[..., 3:9]) and (bare[..., 7:9] - found[..., 7:9]).abs().max() > 1e-3


def test_overlapping_foregrounds_count_by_their_feathers_and_the_edge_of_one_does_not_show_in_the_other(regional):
    predict, part = regional
    a = Region(x=0, y=0, w=0.75, h=1, prompt="a red circle", blend_mode="foreground", feather_ratio=0.5)
    b = Region(x=0.25, y=0, w=0.75, h=1, prompt="a blue square", blend_mode="foreground", feather_ratio=0.5)
    red, blue = part(0, 18, "on white, a red circle"), part(6, 24, "on white, a blue square")
    m = torch.zeros(2, 24)
    m[0, :18] = 1
    m[0, 14:18] = torch.tensor([9, 4, 1, 0]) / 16
    m[1, 6:] = 1
    m[1, 6:10] = torch.tensor([0, 1, 4, 9]) / 16
    found = predict(a, b)
    expected = (red[..., 6:] * m[0, 6:18] + blue[..., :12] * m[1, 6:18]) / (m[0, 6:18] + m[1, 6:18])
    opacity = 1 - (1 - m[0, 6:18]) * (1 - m[1, 6:18])
    assert (opacity[:3] == 1).all() and close(found[..., :7], red[..., :7])
    solid = opacity == 1
    assert close(found[..., 6:18][..., solid], expected[..., solid]) and solid.sum() == 12


def test_a_region_s_own_guidance_is_what_the_pipeline_s_becomes(regional):
    predict, part = regional
    found = predict(Region(x=0, y=0, w=0.5, h=1, prompt="a red circle", guidance_scale=9.0), RIGHT, guidance=4.0)
    uncond, cond = found.chunk(2)
    n, p = part(0, 12, "on white, a red circle").chunk(2)
    assert torch.allclose((uncond + 4 * (cond - uncond))[..., :12], n + 9 * (p - n), atol=1e-4)
    n, p = part(12, 24, "on white, a blue square").chunk(2)
    assert torch.allclose((uncond + 4 * (cond - uncond))[..., 12:], n + 4 * (p - n), atol=1e-4)


def test_a_region_s_guidance_without_guidance_in_the_picture_is_one_clear_line(pipe):
    region = Region(x=0, y=0, w=1, h=1, guidance_scale=9.0)
    with (
        pytest.raises(BadInput, match="give the pipeline a guidance_scale above 1"),
        tiled_diffusion(pipe, regions=[region]),
    ):
        picture(pipe, guidance_scale=1.0)


def test_a_disabled_region_is_not_there(pipe, canvas):
    off = Region(x=0, y=0, w=1, h=1, prompt="a red circle", enable=False)
    with tiled_diffusion(pipe, **TILES, regions=[off]):
        found = predicted(pipe, *canvas)
    with tiled_diffusion(pipe, **TILES):
        assert torch.equal(predicted(pipe, *canvas), found)


def test_a_whole_canvas_region_draws_what_its_prompt_draws(pipe):
    whole = Region(x=0, y=0, w=1, h=1, prompt="a red circle on blue", negative_prompt="green")
    plain = picture(pipe, negative_prompt="green")
    with tiled_diffusion(pipe, regions=[whole]):
        assert torch.equal(picture(pipe, prompt=""), plain)


def test_text_that_did_not_come_from_the_pipeline_is_refused(pipe, canvas):
    with pytest.raises(BadInput, match="own prompt"), tiled_diffusion(pipe, regions=[LEFT]):
        predicted(pipe, *canvas)


def test_a_seeded_region_starts_from_its_own_noise_in_txt2img_and_img2img(pipe):
    seeded = [Region(x=0, y=0, w=0.5, h=1, seed=7), Region(x=0.5, y=0, w=0.5, h=1)]
    own = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(7))
    canvas = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    scheduler = with_scheduler(pipe, EulerDiscreteScheduler)
    image = torch.randn(1, 4, 16, 24)
    img2img = StableDiffusionImg2ImgPipeline(**parts_of(pipe), requires_safety_checker=False)
    img2img.set_progress_bar_config(disable=True)
    noises, starts = [], []
    original = pipe.scheduler.add_noise
    try:
        pipe.scheduler.add_noise = lambda x, noise, t: noises.append(noise) or original(x, noise, t)
        with tiled_diffusion(img2img, **TILES, regions=seeded):
            picture(img2img, image=image, strength=0.5)
        del pipe.scheduler.add_noise
        with tiled_diffusion(pipe, **TILES, regions=seeded):
            pipe.scheduler.set_timesteps(3)
            sigma = pipe.scheduler.init_noise_sigma
            source = torch.Generator().manual_seed(0)
            starts = pipe.prepare_latents(1, 4, 128, 192, torch.float32, torch.device("cpu"), source) / sigma
    finally:
        vars(pipe.scheduler).pop("add_noise", None)
        pipe.scheduler = scheduler
    assert torch.equal(noises[0][..., :12], own) and torch.equal(noises[0][..., 12:], canvas[..., 12:])
    assert torch.allclose(starts[..., :12], own) and torch.allclose(starts[..., 12:], canvas[..., 12:])


def test_a_seeded_region_of_an_inpainting_keeps_its_noise_in_every_step(pipe):
    inpaint = StableDiffusionInpaintPipeline(**parts_of(pipe), requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    noises, original = [], pipe.scheduler.add_noise
    pipe.scheduler.add_noise = lambda x, noise, t: noises.append(noise) or original(x, noise, t)
    image, mask = torch.rand(1, 3, 128, 192), torch.ones(1, 1, 128, 192)
    try:
        for strength in (0.7, 1.0):
            with tiled_diffusion(inpaint, **TILES, regions=[Region(x=0, y=0, w=0.5, h=1, seed=7)]):
                given = dict(mask_image=mask, strength=strength, steps=3)
                picture(inpaint, image=image, **given)
    finally:
        del pipe.scheduler.add_noise
    own = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(7))
    assert len(noises) == 4 and all(torch.equal(noise[..., :12], own) for noise in noises)


def test_a_region_s_loras_are_active_in_it_alone_and_nothing_of_them_changes(own_pipe):
    pipe = own_pipe
    for name, seed in (("style", 0), ("other", 1)):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.unet.add_adapter(config, name)
    pipe.unet.set_adapters(["style", "other"], [0.5, 2.0])
    latents = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(1))
    main = text_of(pipe, "on white")
    layers = [m for m in pipe.unet.modules() if hasattr(m, "_active_adapter")]
    before = [set(vars(layer)) for layer in layers], {n: p.requires_grad for n, p in pipe.unet.named_parameters()}
    thirds = [
        Region(x=i / 3, y=0, w=1 / 3, h=1, adapters=adapters) for i, adapters in enumerate((("other",), (), None))
    ]
    with tiled_diffusion(pipe, **TILES, regions=thirds), torch.no_grad():
        pipe.encode_prompt("on white", torch.device("cpu"), 1, True)
        found = predicted(pipe, latents, main)
    assert before == (
        [set(vars(layer)) for layer in layers],
        {n: p.requires_grad for n, p in pipe.unet.named_parameters()},
    )
    parts = [latents[..., left : left + 8] for left in (0, 8, 16)]
    assert close(found[..., 16:], predicted(pipe, parts[2], main))
    pipe.unet.set_adapters(["other"], [2.0])
    assert close(found[..., :8], predicted(pipe, parts[0], main))
    pipe.unet.disable_adapters()
    assert close(found[..., 8:16], predicted(pipe, parts[1], main))
    assert (found[..., :8] - predicted(pipe, parts[0], main)).abs().max() > 1e-3


@pytest.mark.gate
def test_regions_put_their_colours_in_their_places(pipe):
    from examples.tiny_sd.scenes import COLOURS

    halves = [
        Region(x=0, y=0, w=0.5, h=1, prompt="a red circle on blue"),
        Region(x=0.5, y=0, w=0.5, h=1, prompt="a yellow square on green", blend_mode="foreground", feather_ratio=0.1),
    ]
    with tiled_diffusion(pipe, tile_width=32, tile_height=32, regions=halves):
        pixels = 255 * torch.tensor(picture(pipe, 512, 256, "", steps=8, output_type="np")[0])
    distance = torch.stack([(pixels - torch.tensor(colour)).norm(dim=-1) for colour in COLOURS.values()])
    nearest, names = distance.argmin(0), list(COLOURS)
    share = lambda half, name: (half == names.index(name)).float().mean().item()
    left, right = nearest[:, :256], nearest[:, 256:]
    for half, background, colour in ((left, "blue", "red"), (right, "green", "yellow")):
        assert share(half, background) > 0.5 and 0.03 < share(half, colour) < 0.5
        assert share(half, background) + share(half, colour) > 0.9


# SDXL


@pytest.fixture
def sdxl_calls(tiny_sdxl):
    """What the UNet's own forward is given."""
    calls, original = [], tiny_sdxl.unet.forward
    tiny_sdxl.unet.forward = lambda *args, **kwargs: calls.append(kwargs) or original(*args, **kwargs)
    tiny_sdxl.unet.forward.__dict__["__wrapped__"] = original
    yield calls
    del tiny_sdxl.unet.forward


def test_sdxl_in_one_tile_is_bit_equal_and_its_tiles_know_their_place_in_the_picture(tiny_sdxl, sdxl_calls):
    prompts = ["a red circle on blue", "two white squares"]
    plain = picture(tiny_sdxl, prompt=prompts, steps=1)
    assert (plain[0] - plain[1]).abs().max() > 1e-2
    with tiled_diffusion(tiny_sdxl):
        assert torch.equal(picture(tiny_sdxl, prompt=prompts, steps=1), plain)
    sdxl_calls.clear()
    with tiled_diffusion(tiny_sdxl, **TILES):
        picture(tiny_sdxl, prompt=prompts, steps=1)
    (call,) = sdxl_calls
    expected = [[128, 192, 0, left, 128, 128] for left in (0, 64) for _ in range(4)]
    assert call["added_cond_kwargs"]["time_ids"].tolist() == expected
    pooled = call["added_cond_kwargs"]["text_embeds"]
    assert torch.equal(pooled[:4], pooled[4:]) and call["encoder_hidden_states"].shape == (8, 32, 80)


def test_an_sdxl_region_has_its_own_text_pooled_text_and_size(tiny_sdxl, sdxl_calls):
    prompts = ["on blue", "on white"]
    with tiled_diffusion(tiny_sdxl, **TILES, regions=[LEFT, RIGHT]):
        picture(tiny_sdxl, prompt=prompts, steps=1, negative_prompt="stripes")
    (call,) = sdxl_calls
    for rows, (added, negative) in enumerate([("a red circle", "stripes, green"), ("a blue square", "stripes")]):
        p, n, pooled, negative_pooled = tiny_sdxl.encode_prompt(
            [f"{main}, {added}" for main in prompts],
            device=torch.device("cpu"),
            negative_prompt=[negative] * 2,
        )
        part = slice(4 * rows, 4 * rows + 4)
        assert torch.equal(call["encoder_hidden_states"][part], torch.cat([n, p]))
        assert torch.equal(call["added_cond_kwargs"]["text_embeds"][part], torch.cat([negative_pooled, pooled]))
        assert call["added_cond_kwargs"]["time_ids"][part].tolist() == [[128, 192, 0, 0, 128, 96]] * 4
