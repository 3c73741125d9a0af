"""Whole SDXL pipelines: what the UNet is told of sizes, and that both kinds of method draw."""

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from sd_hyena.large.around import replaced
from sd_hyena.large.growing.deep_shrink import deep_shrink
from sd_hyena.large.growing.demofusion import demofusion
from sd_hyena.large.growing.hidiffusion import hidiffusion
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


@torch.no_grad()
def test_sdxl_is_a_raunet_of_two_pictures_each_of_which_is_what_it_is_alone(tiny_sdxl):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {**tiny_sdxl.unet.config, "block_out_channels": (16, 32, 32), "transformer_layers_per_block": [1, 2, 1]}
        kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
        given |= {"down_block_types": kinds, "up_block_types": [k.replace("Down", "Up") for k in reversed(kinds)]}
        unet = UNet2DConditionModel.from_config(given | {"attention_head_dim": [1, 2, 2]}).eval()
    pipe = StableDiffusionXLPipeline(**tiny_sdxl.components | {"unet": unet}, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    common = dict(width=104, height=72, num_inference_steps=3, guidance_scale=3.0, output_type="latent")

    def draw(*seeds):
        sources = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe("a red circle", generator=sources, num_images_per_prompt=len(seeds), **common).images

    plain, before = draw(1), state_of(unet)
    with hidiffusion(pipe, own=8):
        both, one, other = draw(0, 1), draw(0), draw(1)
    assert torch.allclose(both, torch.cat([one, other]), atol=1e-3) and not torch.allclose(other, plain, atol=1e-2)
    assert state_of(unet) == before and torch.equal(draw(1), plain)
