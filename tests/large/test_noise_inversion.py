import random
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)

from examples.tiny_sd.scenes import draw, numbered_scene
from examples.tiny_sd.train import HELD_OUT_SEED, to_tensor
from sd_hyena.errors import BadInput
from sd_hyena.large.noise_inversion import EPS, box_mean, detail, inverted, noise_inversion
from sd_hyena.large.regions import Region
from sd_hyena.large.tiled_unet import tiled_diffusion
from tests.gate import gated
from tests.large.test_tiled_unet import parts_of, state_of

SCENE = numbered_scene(HELD_OUT_SEED, 2)
PROMPT = str(SCENE.caption)


@pytest.fixture
def img2img(pipe):
    made = StableDiffusionImg2ImgPipeline(**parts_of(pipe), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    scheduler = made.scheduler
    yield made
    made.register_modules(scheduler=scheduler)


@pytest.fixture(scope="module")
def image():
    """A held-out scene of 96x64 pixels, (1, 3, 64, 96) in -1 ... 1."""
    return to_tensor(draw(SCENE, 96))[None, :, 16:80]


def drawn(pipe, image, seeds=(0,), prompt=PROMPT, strength=0.4, steps=10, **given):
    """Latents; at strength .4 of 10 steps the shipped scheduler starts at timestep 399."""
    given = dict(guidance_scale=1.0, output_type="latent", num_images_per_prompt=len(seeds)) | given
    given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    image = (image + 1) / 2 if image.shape[1] == 3 else image
    return pipe(prompt, image=image, strength=strength, num_inference_steps=steps, **given).images


@pytest.fixture
def added(img2img):
    """Every (picture, noise, timestep) that the scheduler itself is given."""
    seen, original = [], img2img.scheduler.add_noise
    scheduler = img2img.scheduler
    scheduler.add_noise = lambda *given: seen.append(given) or original(*given)
    yield seen
    del scheduler.add_noise


def given_to(added):
    """What the pipeline's own call was given, without the ones and zeros that ask for sigma."""
    return [call for call in added if call[0].numel() > 1]


# The way back


def test_the_noise_is_the_sum_of_steps_each_seen_at_the_level_that_it_goes_to():
    sigmas, seen = np.linspace(0.03, 12, 1000), []
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    found = inverted(lambda y, *level: seen.append(level) or torch.full_like(y, level[0]), x, 6.0, sigmas, 7, 2.0)
    levels, timesteps = (list(one) for one in zip(*seen, strict=True))
    wanted = sum(b * (b - a) for a, b in zip([0.0, *levels[:-1]], levels, strict=True)) / 6
    assert torch.allclose(found, torch.full_like(x, wanted), rtol=1e-5)
    last = (6 - 0.03) / (12 - 0.03) * 999
    assert np.allclose(timesteps, [last * i / 7 / 2 for i in range(1, 8)]) and levels[-1] == 6
    assert np.allclose(levels, np.interp(2 * np.array(timesteps), np.arange(1000), sigmas), rtol=1e-4)


def test_the_way_back_is_ddim_s_written_with_its_own_alphas(img2img, image, added):
    """A loop over z = sqrt(alpha) picture + sqrt(1 - alpha) noise, with the velocity that the shipped UNet predicts."""
    with noise_inversion(img2img, steps=7, renoise_strength=0):
        drawn(img2img, image)
    ((picture, noise, timestep),) = given_to(added)
    assert timestep.item() == 399
    alphas = img2img.scheduler.alphas_cumprod
    text, z, begin = img2img.encode_prompt(PROMPT, torch.device("cpu"), 1, False)[0], picture.clone(), torch.tensor(1.0)
    with torch.no_grad():
        for t in range(57, 400, 57):
            alpha = alphas[t]
            clean_and_noise = z * (alpha / begin).sqrt()
            noise_seen = (
                alpha.sqrt() * img2img.unet(scaled := _to_level(z, begin, alpha), t, text).sample
                + (1 - alpha).sqrt() * scaled
            )
            z = clean_and_noise + ((1 - alpha).sqrt() - ((1 - begin) * alpha / begin).sqrt()) * noise_seen
            begin = alpha
    expected = (z - begin.sqrt() * picture) / (1 - begin).sqrt()
    assert torch.allclose(noise, expected, atol=2e-4) and noise.std() > 0.3


def _to_level(z, begin, alpha):
    """x / sqrt(begin), which is picture plus noise, as the UNet is given it at the level of alpha."""
    return z / begin.sqrt() * alpha.sqrt()


@pytest.mark.parametrize("kind", [*gated([DDIMScheduler, EulerDiscreteScheduler]), UniPCMultistepScheduler])
def test_what_is_inverted_and_drawn_again_is_the_picture_with_any_scheduler(img2img, image, kind):
    img2img.register_modules(scheduler=kind.from_config(img2img.scheduler.config))
    picture = drawn(img2img, image, strength=0.02, steps=50)  # the latents, but for their last step
    far = (drawn(img2img, image) - picture).square().mean()
    errors = []
    for steps in (3, 12):
        with noise_inversion(img2img, steps=steps, renoise_strength=0):
            errors.append((drawn(img2img, image, steps=20) - picture).square().mean())
    assert errors[1] < errors[0] < far and errors[1] < far / 8


def test_at_a_strength_near_zero_the_latents_come_back(img2img, image, added):
    with noise_inversion(img2img, steps=4, renoise_strength=0):
        near = drawn(img2img, image, strength=0.02, steps=50)
    ((picture, _, timestep),) = given_to(added)
    rms = lambda x: x.square().mean().sqrt()
    assert timestep.item() == 19 and rms(near - picture) < 0.02 * rms(picture)
    added.clear()
    assert rms(drawn(img2img, image, strength=0.02, steps=50) - picture) > 0.04 * rms(picture)


# What is mixed in


@pytest.mark.parametrize("height, width, radius", [(7, 11, 2), (5, 9, 6), (13, 8, 1)])
def test_detail_is_what_a_guided_filter_written_as_a_loop_takes_away(height, width, radius):
    picture = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grey = ((picture + 1) / 2 * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1).double().numpy()

    def near(y, x):
        return slice(max(y - radius, 0), y + radius + 1), slice(max(x - radius, 0), x + radius + 1)

    cells = list(product(range(height), range(width)))
    for one, found in zip(grey, detail(picture, radius)[:, 0], strict=True):
        a, b, wanted = (np.zeros_like(one) for _ in range(3))
        for cell in cells:
            window = one[near(*cell)]
            a[cell] = window.var() / (window.var() + EPS)
            b[cell] = (1 - a[cell]) * window.mean()
        for cell in cells:
            smooth = a[near(*cell)].mean() * one[cell] + b[near(*cell)].mean()
            wanted[cell] = min(abs(one[cell] - smooth) / EPS**0.5, 1)
        assert np.allclose(found, wanted, atol=1e-6)
    assert box_mean(torch.ones(3, 4), 9).allclose(torch.ones(3, 4))


def test_fresh_noise_takes_the_place_of_the_found_one_where_the_picture_is_smooth(img2img, image, added):
    noisy = image.clone()
    noisy[..., 48:] += 0.2 * torch.randn(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    noisy = noisy.clamp(-1, 1)
    for strength in (0, 1, 2):
        with noise_inversion(img2img, steps=3, renoise_strength=strength, renoise_kernel=8):
            drawn(img2img, noisy)
    drawn(img2img, noisy)
    found, half, most, fresh = (noise for _, noise, _ in given_to(added))
    flat = detail(noisy, 8)[0, 0].unflatten(0, (8, 8)).unflatten(2, (12, 8)).amax((1, 3)) < 1e-6
    assert flat[:, :6].any() and not flat[:, 6:].any()
    assert torch.equal(half[0][:, flat], fresh[0][:, flat]) and torch.equal(most[0][:, flat], fresh[0][:, flat])
    share = 1 - torch.nn.functional.avg_pool2d(detail(noisy, 8), 8)
    wanted = ((1 - share) * found + share * fresh) / ((1 - share) ** 2 + share**2).sqrt()
    assert torch.allclose(half, wanted, atol=1e-5) and not torch.allclose(half, fresh, atol=0.1)


def test_retouch_tells_the_unet_an_earlier_timestep(img2img, image):
    seen = []
    hook = img2img.unet.register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    try:
        with noise_inversion(img2img, steps=3, retouch=2.0):
            drawn(img2img, image)
    finally:
        hook.remove()
    assert np.allclose(seen, [66.5, 133, 199.5, 399, 299, 199, 99], rtol=1e-4)


# With the rest of the program


def test_every_row_of_a_batch_is_what_it_is_alone_and_no_global_random_state_moves(img2img, image):
    python, state = random.getstate(), torch.get_rng_state()
    given = dict(guidance_scale=4.0, negative_prompt="stripes", steps=5)
    with noise_inversion(img2img, steps=3):
        both = drawn(img2img, image, seeds=(3, 4), **given)
        alone = torch.cat([drawn(img2img, image, seeds=(seed,), **given) for seed in (3, 4)])
    assert torch.allclose(both, alone, atol=1e-4) and (both[0] - both[1]).abs().max() > 1e-2
    assert random.getstate() == python and torch.equal(torch.get_rng_state(), state)


def test_the_way_back_is_tiled_and_follows_regions(img2img, image):
    sizes = []
    hook = img2img.unet.conv_in.register_forward_hook(lambda _, args, __: sizes.append(tuple(args[0].shape[2:])))
    whole = Region(x=0, y=0, w=1, h=1, prompt=PROMPT)
    try:
        with noise_inversion(img2img, steps=3):
            plain = drawn(img2img, image, steps=5)
            with tiled_diffusion(img2img):
                assert torch.equal(drawn(img2img, image, steps=5), plain)
            with tiled_diffusion(img2img, regions=[whole]):
                assert torch.allclose(drawn(img2img, image, steps=5, prompt=""), plain, atol=1e-5)
            sizes.clear()
            with tiled_diffusion(img2img, tile_width=8, tile_height=8):
                tiled = drawn(img2img, image, steps=5)
    finally:
        hook.remove()
    assert set(sizes) == {(8, 8)} and not torch.allclose(tiled, plain, atol=1e-3)


def test_an_inpainting_adds_the_same_found_noise_in_every_step(pipe, image, added):
    inpaint = StableDiffusionInpaintPipeline(**parts_of(pipe), requires_safety_checker=False)
    inpaint.set_progress_bar_config(disable=True)
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 48:] = 1
    given = dict(mask_image=mask, height=64, width=96)
    with noise_inversion(inpaint, steps=3, renoise_strength=0):
        drawn(inpaint, image, **given)
        noises = [noise for _, noise, _ in given_to(added)]
        assert len(noises) == 4 and all(torch.equal(noise, noises[0]) for noise in noises)
        assert noises[0].std() < 0.9
        added.clear()
        drawn(inpaint, image, strength=1.0, **given)
        drawn_anew = [noise for _, noise, _ in given_to(added)]
    added.clear()
    drawn(inpaint, image, strength=1.0, **given)
    assert all(map(torch.equal, drawn_anew, [noise for _, noise, _ in given_to(added)]))


def test_sdxl_is_told_the_picture_s_size_and_its_pooled_text(tiny_sdxl, image):
    parts = {name: part for name, part in tiny_sdxl.components.items() if part is not None}
    xl = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    xl.set_progress_bar_config(disable=True)
    calls, original = [], xl.unet.forward
    xl.unet.forward = lambda *args, **given: calls.append(given) or original(*args, **given)
    try:
        with noise_inversion(xl, steps=2):
            drawn(xl, image, seeds=(0, 1), steps=5)
    finally:
        del xl.unet.forward
    back, forth = calls[:2], calls[2:]
    assert len(forth) == 2
    for call, name in product(back, ("text_embeds", "time_ids")):
        assert torch.equal(call["added_cond_kwargs"][name], forth[0]["added_cond_kwargs"][name])
    assert torch.equal(back[0]["encoder_hidden_states"], forth[0]["encoder_hidden_states"])


def test_everything_is_restored_after_the_block_and_after_an_exception(img2img, image):
    before, plain = state_of(img2img), drawn(img2img, image, steps=5)
    with pytest.raises(BadInput, match="the picture itself"), noise_inversion(img2img, steps=2):
        assert not torch.allclose(drawn(img2img, image, steps=5), plain, atol=1e-2)
        drawn(img2img, torch.randn(1, 4, 8, 12))
    assert state_of(img2img) == before and torch.equal(drawn(img2img, image, steps=5), plain)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(steps=0), "steps=0 of the noise inversion must be a whole number from 1 to 1000"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(retouch=0.5), "retouch=0.5 of the noise inversion must be a number from 1 to 100"),
        (dict(retouch=float("nan")), "retouch=nan"),
        (dict(renoise_strength=-1), "renoise_strength=-1"),
        (dict(renoise_strength=True), "renoise_strength=True"),
        (dict(renoise_kernel=0), "renoise_kernel=0"),
    ],
)
def test_an_option_that_cannot_work_is_one_clear_line(img2img, options, message):
    with pytest.raises(BadInput, match=message) as error, noise_inversion(img2img, **options):
        pass
    assert "\n" not in str(error.value)


def test_a_pipeline_that_starts_from_no_picture_is_refused(pipe):
    with pytest.raises(BadInput, match="StableDiffusionPipeline takes none"), noise_inversion(pipe):
        pass
