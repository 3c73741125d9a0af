import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.large.bricks import get_bricks
from sd_hyena.large.large_res_patch import LargeResPatch
from sd_hyena.large.tiled_vae import tiled_vae
from tests.conftest import IN01
from tests.fixtures import image_of
from tests.large.test_feed_forward import lengths
from tests.large.test_tiled_attention import latents, met, predict, state_of


@pytest.mark.gate
def test_it_is_bricks_chunked_feed_forward_and_the_two_pass_vae_together(pipe):
    """With the arguments in the order of the original."""
    before, z = state_of(pipe.unet), latents(20, 28, 1)
    with torch.no_grad(), tiled_vae(pipe.vae, mode="two_pass", decoder_tile_size=8, encoder_tile_size=64):
        decoded, encoded = pipe.vae.decode(z).sample, pipe.vae.encode(decoded_image(z)).latent_dist.mean
    with torch.no_grad(), LargeResPatch(pipe, 2048, 768, 8, 16, "shifted", 100, "constant", 16, 8) as patched:
        assert patched is pipe
        bricks = met(pipe.unet, lambda: predict(pipe.unet, latents(24, 40, 1)), IN01)
        assert lengths(pipe.unet, lambda: predict(pipe.unet, latents(24, 40, 1)))[0][:10] == [100] * 9 + [60]
        assert torch.equal(pipe.vae.decode(z).sample, decoded)
        assert torch.equal(pipe.vae.encode(decoded_image(z)).latent_dist.mean, encoded)
    tiles = [(h, w) for _, _, h, w in get_bricks(40, 24, 0, 8, 16, "shifted")]
    assert sorted(bricks) == sorted({(tiles.count((h, w)), h * w) for h, w in tiles})
    assert state_of(pipe.unet) == before
    with torch.no_grad():
        assert not torch.equal(pipe.vae.decode(z).sample, decoded)


def decoded_image(z):
    return torch.nn.functional.interpolate(z[:, :3], scale_factor=8).clamp(-1, 1)


def test_up_to_1024_pixels_nothing_is_patched(pipe):
    plain = image_of(pipe)
    with LargeResPatch(pipe, 1024, 1024, 8, 8, ff_chunk_size=7, vae_chunk_size_x=8):
        assert torch.equal(image_of(pipe), plain)
        assert not any("forward" in vars(module) for module in pipe.unet.modules())
        assert not {"_encode", "_decode"} & set(vars(pipe.vae))
    with LargeResPatch(pipe, 512, 1032, 8, 8):
        bricked = image_of(pipe, width=160)
    assert not torch.equal(image_of(pipe, width=160), bricked)
    assert torch.equal(image_of(pipe), plain)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(attn_slice_x=0), "attn_slice_x=0"),
        (dict(attn_shape="bricks"), "attn_shape='bricks'"),
        (dict(ff_chunk_size=0), "ff_chunk_size=0"),
        (dict(padding_mode="mirror"), "padding_mode='mirror'"),
        (dict(vae_chunk_size_y=0), "tile_size=0"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_stays_half_patched(pipe, given, words):
    before, vae = state_of(pipe.unet), dict(vars(pipe.vae))
    with pytest.raises(BadInput, match=words), LargeResPatch(pipe, 2048, 2048, **given):
        pass
    assert state_of(pipe.unet) == before and vars(pipe.vae) == vae
