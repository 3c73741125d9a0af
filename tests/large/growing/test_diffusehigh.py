"""The wavelet band against a matrix, and the whole method against a naive reading of its paper."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.large.float32 import finite
from sd_hyena.large.growing.diffusehigh import diffusehigh, foreseen, sharpened, told
from sd_hyena.large.growing.wavelet import daubechies, low_band
from sd_hyena.large.noise_inversion import noise_inversion
from sd_hyena.large.regions import Region
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.options.sampler import SAMPLERS, set_scheduler
from tests.gate import gated


@pytest.mark.parametrize("moments", [1, 2, 4, 8])
def test_the_taps_are_orthonormal_to_their_shifts_and_their_high_pass_has_vanishing_moments(moments):
    taps = torch.tensor(daubechies(moments), dtype=torch.float64)
    for shift in range(moments):
        assert abs((taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum() - float(shift == 0)) < 1e-9
    high = taps.flip(0) * torch.tensor([(-1.0) ** k for k in range(2 * moments)], dtype=torch.float64)
    places = torch.arange(2 * moments, dtype=torch.float64)
    assert all(abs((high * places**power).sum()) < 1e-4 for power in range(moments)) and taps.sum() > 0
    if moments == 1:
        assert torch.allclose(taps, torch.full((2,), 0.5**0.5, dtype=torch.float64))


def test_on_a_circle_the_low_band_is_a_matrix_of_shifted_taps_and_its_transpose():
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def projection(length: int) -> torch.Tensor:
        rows = torch.zeros(length // 2, length, dtype=torch.float64)
        for i in range(length // 2):
            for k, tap in enumerate(daubechies(4)):
                rows[i, (2 * i + k) % length] += tap
        return rows.T @ rows

    expected = projection(24) @ x @ projection(40)
    assert torch.allclose(low_band(x, circular=True), expected, atol=1e-12)
    again = low_band(low_band(x, circular=True), circular=True)
    assert torch.allclose(again, expected, atol=1e-12)


@pytest.mark.parametrize("size", [(37, 50), (9, 64), (64, 33)])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_low_band_keeps_constants_and_slow_waves_at_any_size_and_loses_fast_ones(size, levels):
    ones = torch.ones(1, 2, *size, dtype=torch.float64)
    assert torch.allclose(low_band(ones, levels), ones, atol=1e-8)
    rows = torch.arange(size[1], dtype=torch.float64)
    fast = torch.cos(math.pi * rows).expand(1, 1, *size)
    middle = low_band(fast, levels)[..., size[1] // 2]
    assert middle.abs().max() < (1e-3 if min(size) > 32 and levels < 3 else 0.5)  # else borders are near everywhere


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_what_a_prediction_foresees_is_the_scheduler_s_own_and_goes_back(kind):
    scheduler = DDIMScheduler(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(10)
    source = torch.Generator().manual_seed(1)
    x, prediction = (torch.randn(2, 4, 5, 7, generator=source) for _ in range(2))
    t = scheduler.timesteps[3]
    alpha = scheduler.alphas_cumprod[t]
    clean = foreseen(prediction, x, alpha.sqrt(), (1 - alpha).sqrt(), kind)
    assert torch.allclose(clean, scheduler.step(prediction, t, x).pred_original_sample, atol=1e-5)
    assert torch.allclose(told(clean, x, alpha.sqrt(), (1 - alpha).sqrt(), kind), prediction, atol=1e-4)


def img2img(pipe):
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(width=72, height=64):
    source = torch.Generator().manual_seed(5)
    small = (255 * torch.rand(8, 9, 3, generator=source)).byte().numpy()
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def call(pipe, seed=3, **given):
    given = dict(num_inference_steps=6, strength=0.5, guidance_scale=3.0, output_type="latent") | given
    return pipe(
        "a red circle on blue", image=picture(), generator=[torch.Generator().manual_seed(seed)], **given
    ).images


@pytest.mark.parametrize("kind", ["v_prediction", *gated(["epsilon"])])
def test_it_is_the_paper_read_naively(own_pipe, kind):
    """Noise the enlarged picture; in the first steps decode the foreseen picture, swap its low band, encode it, step."""
    pipe = own_pipe
    pipe.scheduler.register_to_config(prediction_type=kind)  # SD 2.x predicts v, as the model that ships; 1.x epsilon
    own = img2img(pipe)
    with diffusehigh(own, steps=2):
        drawn = call(own)
    vae, scheduler, factor = pipe.vae, own.scheduler, pipe.vae.config.scaling_factor
    held = sharpened_by_hand(own.image_processor.preprocess(picture()), 1.0).float()
    source = torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = vae.encode(held).latent_dist.sample(source) * factor
        text, empty = own.encode_prompt("a red circle on blue", "cpu", 1, True)
        scheduler.set_timesteps(6)
        for i, t in enumerate(scheduler.timesteps[3:]):
            if i == 0:
                x = scheduler.add_noise(x, torch.randn(x.shape, generator=source), t[None])
            unguided, guided = pipe.unet(torch.cat([x, x]), t, torch.cat([empty, text])).sample.chunk(2)
            v = unguided + 3.0 * (guided - unguided)
            now, before = scheduler.alphas_cumprod[t], t - scheduler.config.num_train_timesteps // 6
            then = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
            clean = now.sqrt() * x - (1 - now).sqrt() * v
            clean = (x - (1 - now).sqrt() * v) / now.sqrt() if kind == "epsilon" else clean
            if i < 2:
                seen = vae.decode(clean / factor).sample
                seen = seen + low_band(held - seen)
                clean = vae.encode(seen.clamp(-1, 1)).latent_dist.mean * factor
            noise = (x - now.sqrt() * clean) / (1 - now).sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * noise
    assert torch.allclose(drawn, x, atol=2e-4 * max(1.0, x.abs().max().item()))


@pytest.mark.parametrize("name", ["heun", *gated(name for name in SAMPLERS if name != "heun")])
def test_any_sampler_is_held_to_the_picture_and_nothing_stays(own_pipe, name):
    set_scheduler(own_pipe, name)
    own = img2img(own_pipe)
    plain = call(own)
    with diffusehigh(own, steps=9):
        drawn = call(own)
    assert torch.equal(call(own), plain) and "step" not in vars(own.scheduler)
    band = lambda latents: low_band(own.vae.decode(latents / own.vae.config.scaling_factor).sample)
    with torch.no_grad():
        held = low_band(own.image_processor.preprocess(picture()))
        assert (band(drawn) - held).square().mean() < 0.7 * (band(plain) - held).square().mean()


def test_what_cannot_work_is_refused_in_one_line(pipe):
    for given, rule in (
        (dict(levels=0), "levels=0"),
        (dict(steps=-1), "steps=-1"),
        (dict(moments=11), "moments=11"),
        (dict(alpha=-1), "alpha=-1"),
    ):
        with pytest.raises(BadInput, match=rule), diffusehigh(img2img(pipe), **given):
            pass
    with pytest.raises(BadInput, match="takes none"), diffusehigh(pipe):
        pass
    with pytest.raises(BadInput, match="not its latents"), diffusehigh(own := img2img(pipe)):
        own("a red circle", image=torch.zeros(1, 4, 8, 8), strength=0.5, num_inference_steps=2)


def test_sharpening_leaves_flat_colour_and_adds_what_a_gaussian_takes_away():
    flat = torch.full((1, 3, 9, 16), -0.3)
    assert torch.allclose(sharpened(flat), flat, atol=1e-6) and sharpened(flat, 0.0) is flat
    x = torch.rand(2, 3, 11, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    assert torch.allclose(sharpened(x, 0.7), sharpened_by_hand(x, 0.7), atol=1e-6)
    assert sharpened(10 * x).abs().max() == 1


def sharpened_by_hand(x, alpha):
    """Each pixel by its distance; beyond the border lies the border's own pixel."""
    height, width = x.shape[2:]
    rows, columns = (
        torch.stack([sum(g(d) * torch.eye(n, dtype=torch.float64)[min(max(i + d, 0), n - 1)] for d in range(-4, 5))
                     for i in range(n)])
        for n in (height, width)
    )  # fmt: skip
    soft = rows @ x.double() @ columns.T / sum(map(g, range(-4, 5))) ** 2
    return (x + alpha * (x - soft)).clamp(-1, 1)


def g(distance):
    return math.exp(-(distance**2) / 2)


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_the_levels_are_the_scheduler_s_whatever_a_seeded_region_puts_in_place_of_its_noise(pipe, name, monkeypatch):
    scheduler, seen = pipe.scheduler, []
    monkeypatch.setattr(
        "sd_hyena.large.growing.diffusehigh.foreseen",
        lambda prediction, sample, signal, noise, kind: seen.append((signal.item(), noise.item())) or sample,
    )
    monkeypatch.setattr(
        "sd_hyena.large.noise_inversion.inverted", lambda _e, x, sigma, *_: seen.append((1.0, sigma)) or x
    )
    try:
        set_scheduler(pipe, name)
        own = img2img(pipe)
        region = Region(x=0, y=0, w=1, h=1, seed=5)
        tiles = dict(tile_width=64, tile_height=64, regions=[region])
        with tiled_diffusion(own, **tiles), diffusehigh(own, steps=9), noise_inversion(own, steps=1):
            call(own)  # the inversion, too, asks for levels
        steps = own.scheduler.timesteps[3:]
        alphas = own.scheduler.alphas_cumprod
    finally:
        pipe.scheduler = scheduler
    ratios = [noise / signal for signal, noise in seen]
    truth = [((1 - alphas[round(float(t))]) / alphas[round(float(t))]).sqrt().item() for t in steps]
    assert len(seen) == 4 and ratios == pytest.approx([truth[0], *truth], rel=0.02)
    if name == "ddim":
        assert seen[1] == pytest.approx((alphas[steps[0]].sqrt().item(), (1 - alphas[steps[0]]).sqrt().item()))


@torch.no_grad()
def test_a_half_of_the_vae_that_overflows_computes_again_in_float32():
    layer = torch.nn.Conv2d(4, 3, 1).half()
    torch.nn.init.constant_(layer.weight, 300.0)
    vae = SimpleNamespace(dtype=torch.float16, decoder=layer, post_quant_conv=None)
    call = lambda x: vae.decoder(x) / 1000
    small, large = torch.full((1, 4, 2, 3), 2.0), torch.full((1, 4, 2, 3), 200.0)
    assert finite(small, vae, call, "decoder", "post_quant_conv").mean() == pytest.approx(2.4, rel=1e-2)
    y = finite(large, vae, call, "decoder", "post_quant_conv")
    assert y.dtype == torch.float32 and y.mean() == pytest.approx(240, rel=1e-2)
    assert layer.weight.dtype == torch.float16 and not call(large.half()).isfinite().all()
