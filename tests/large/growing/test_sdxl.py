"""Whole SDXL pipelines: what the UNet is told of sizes, and that both kinds of method draw."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from sd_hyena.large.around import replaced
from sd_hyena.large.growing.deep_shrink import deep_shrink
from sd_hyena.large.growing.demofusion import demofusion
from sd_hyena.large.tiled_unet import tiled_diffusion
from tests.large.growing.conftest import latents, state_of


@pytest.fixture
def sdxl_again(tiny_sdxl):
    pipe = StableDiffusionXLImg2ImgPipeline.from_pipe(tiny_sdxl, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    before = state_of(pipe.unet)
    yield pipe
    assert state_of(pipe.unet) == before


@torch.no_grad()
def test_a_dilated_sample_is_told_its_own_size_and_a_tile_its_place(sdxl_again):
    pipe, told, original = sdxl_again, set(), sdxl_again.unet.forward

    def forward(sample, *args, **kwargs):
        told.update((*sample.shape[-2:], *map(int, row)) for row in kwargs["added_cond_kwargs"]["time_ids"])
        return original(sample, *args, **kwargs)

    forward.__wrapped__ = original
    common = dict(image=latents(14, 9, 2).float(), strength=1.0, num_inference_steps=2, guidance_scale=3.0)
    common |= dict(output_type="latent", num_images_per_prompt=2)
    common |= dict(generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])
    with replaced(pipe.unet, "forward", forward), tiled_diffusion(pipe, tile_width=9, tile_height=8), demofusion(pipe):
        images = pipe("a red circle", **common).images
    assert torch.isfinite(images).all() and images.shape == (2, 4, 14, 9)
    samples = {(7, 5, 112, 72, 0, 0, 56, 40), (7, 4, 112, 72, 0, 0, 56, 32)}
    assert told - samples == {(8, 9, 112, 72, 8 * top, 0, 64, 72) for top in (0, 3, 6)}
    assert samples <= told


@torch.no_grad()
def test_sdxl_draws_with_its_maps_made_smaller_and_plainly_afterwards(tiny_sdxl):
    common = dict(width=72, height=104, num_inference_steps=2, guidance_scale=3.0, output_type="latent")
    draw = lambda: tiny_sdxl("a red circle", generator=torch.Generator().manual_seed(0), **common).images
    plain, before = draw(), state_of(tiny_sdxl.unet)
    with deep_shrink(tiny_sdxl, block=2):
        smaller = draw()
    assert state_of(tiny_sdxl.unet) == before and torch.equal(draw(), plain)
    assert torch.isfinite(smaller).all() and not torch.equal(smaller, plain)
