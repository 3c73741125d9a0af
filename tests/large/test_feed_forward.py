import copy

import pytest
import torch

from sd_hyena.errors import BadInput
from sd_hyena.large.feed_forward import chunk_feed_forward
from sd_hyena.large.tiled_attention import split_attention
from sd_hyena.sites import find_sites
from tests.conftest import IN01
from tests.fixtures import image_of
from tests.gate import gated

BLOCK = IN01.removesuffix(".attn1")


@pytest.fixture
def given():
    """Latents with H != W, a timestep and text, two samples, in float64: rounding cannot hide a mistake."""
    source = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*shape, generator=source).double() for shape in ((2, 4, 10, 14), (2, 32, 96)))
    return latents, 500, text


def lengths(unet, call):
    """How many tokens each feed-forward met during a call, by level."""
    met, hooks = {}, []
    for site in find_sites(unet):
        ff = unet.get_submodule(site.name.removesuffix("attn1") + "ff")
        note = lambda _m, args, level=site.level: met.setdefault(level, []).append(args[0].shape[1])
        hooks.append(ff.register_forward_pre_hook(note))
    call()
    for hook in hooks:
        hook.remove()
    return met


@pytest.mark.parametrize("chunk", [7, 139, 140, *gated([1, 36, 141, 4096])])
def test_the_chunked_feed_forward_is_the_plain_one_for_any_remainder(unet, given, chunk):
    unet = copy.deepcopy(unet).double()
    with torch.no_grad():
        plain = unet(*given).sample
        with chunk_feed_forward(unet, chunk):
            met = lengths(unet, lambda: torch.testing.assert_close(unet(*given).sample, plain))
    tokens = {0: 10 * 14, 1: 5 * 7, 2: 3 * 4, 3: 2 * 2}
    for level, chunks in met.items():
        one = [chunk] * (tokens[level] // chunk) + [tokens[level] % chunk] * bool(tokens[level] % chunk)
        assert chunks == one * (len(chunks) // len(one)), level


def test_gradients_pass_through_the_chunks(unet, given):
    unet, gradients = copy.deepcopy(unet).double().requires_grad_(True), []
    for chunk in (4096, 33):
        unet.zero_grad()
        with chunk_feed_forward(unet, chunk):
            unet(*given).sample.square().sum().backward()
        gradients.append(unet.get_submodule(f"{BLOCK}.ff").net[2].weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("error", [*gated([RuntimeError("on purpose")]), KeyboardInterrupt()])
def test_chunks_stand_in_the_model_during_calls_only_also_after_an_exception(pipe, error):
    unet, plain, keys = pipe.unet, image_of(pipe), list(pipe.unet.state_dict())

    def fail(*_):
        raise error

    with pytest.raises(type(error)), chunk_feed_forward(unet, 10), split_attention(unet, tile_size=32):
        image_of(pipe)
        assert list(unet.state_dict()) == keys
        hook = unet.get_submodule(f"{BLOCK}.ff.net.2").register_forward_hook(fail)
        try:
            image_of(pipe)
        finally:
            hook.remove()
    assert list(unet.state_dict()) == keys and not any("forward" in vars(module) for module in unet.modules())
    assert torch.equal(image_of(pipe), plain)


def test_what_cannot_be_chunked_is_refused(pipe):
    for arguments, words in [((pipe.unet, 0), "ff_chunk_size=0 must be at least 1"), ((pipe.vae,), "AutoencoderKL")]:
        with pytest.raises(BadInput, match=words), chunk_feed_forward(*arguments):
            pass
