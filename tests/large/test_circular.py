import torch

from sd_hyena.generate.arrangement import Arrangement
from sd_hyena.large.circular import circular_convolutions
from sd_hyena.options.generate_config import GenerateConfig


def predictions(unet, latents, turn=(0, 0)):
    text = torch.randn(1, 8, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(torch.roll(latents, turn, (2, 3)), torch.tensor(500), text).sample


def test_latents_that_are_turned_give_the_prediction_turned_and_afterwards_the_borders_count_again(unet):
    latents = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    plain = predictions(unet, latents)
    with circular_convolutions(unet):
        whole, turned = predictions(unet, latents), predictions(unet, latents, (8, 16))
    assert torch.allclose(torch.roll(whole, (8, 16), (2, 3)), turned, atol=1e-4)
    turned = torch.roll(plain, (8, 16), (2, 3))
    assert not torch.allclose(turned, predictions(unet, latents, (8, 16)), atol=1e-2)
    assert torch.equal(predictions(unet, latents), plain)


def test_a_config_goes_round_in_one_piece_or_in_tiles_and_in_the_vae():
    whole, tiled = (
        Arrangement.of(GenerateConfig(width=128, height=64, circular=True, tiled_diffusion=method))
        for method in ("off", "spot")
    )
    assert whole.tiles is None and tiled.tiles.circular
    assert whole.vae.padding_mode == tiled.vae.padding_mode == "circular" and "round the borders" in str(whole)
