from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig

from sd_hyena.errors import BadInput
from sd_hyena.large.growing.hidiffusion import DEFAULTS, hidiffusion, switches
from sd_hyena.large.tiled_unet import tiled_diffusion
from tests.gate import gated
from tests.large.growing.by_hand import controlnet_by_hand, unet_by_hand
from tests.large.growing.conftest import TEXT, latents, predict, small_unet, state_of
from tests.large.growing.test_deep_shrink import HINT, controlled, with_controlnet  # noqa: F401

SD, SDXL = ({"sampled": 0}, {"pooled": 1}), ({"pooled": 1}, {"sampled": 1})  # the first and the second change


def changes_of(pipe, first, second):
    ours = SDXL if pipe.added else SD
    return (ours[0] if first else {}) | (ours[1] if second else {})


@pytest.mark.parametrize("size, t2", [((35, 27), 0.3), ((16, 24), 0.0), *gated([((16, 24), 0.3), ((35, 27), 0.0)])])
def test_a_prediction_is_that_of_a_raunet_written_out(some, size, t2):
    x = latents(*size)
    with hidiffusion(some, t1=0.4, t2=t2, aggressive=0.0):
        ours = predict(some, x)
    with torch.no_grad():
        changes = changes_of(some, True, t2 > 0)
        theirs = unet_by_hand(some.unet, x, 900.0, TEXT, some.added, **changes)
    assert torch.allclose(ours, theirs, atol=1e-10)
    assert (ours - predict(some, x)).abs().max() > 1e-6


@pytest.mark.parametrize(
    "timestep, first, second", [(990, True, True), (701, True, True), (700, True, False), (600, False, False)]
)
def test_each_change_ends_at_its_own_switch_and_the_call_is_then_the_plain_one_bit_for_bit(
    some, timestep, first, second
):
    x = latents(16, 12)
    with hidiffusion(some, t1=0.4, t2=0.3):
        ours = predict(some, x, timestep)
    with torch.no_grad():
        changes = changes_of(some, first, second)
        theirs = unet_by_hand(some.unet, x, float(timestep), TEXT, some.added, **changes)
    assert torch.allclose(ours, theirs, atol=1e-10)
    if not first:
        assert torch.equal(ours, predict(some, x, timestep))


@pytest.mark.parametrize("timestep, changes", [(841, {"sampled": 1}), (839, {"pooled": 1}), (600, {})])
def test_sdxl_starts_with_its_second_change_alone(small, timestep, changes):
    pipe, x = small["sdxl"], latents(16, 12)
    with hidiffusion(pipe):
        ours = predict(pipe, x, timestep)
    with torch.no_grad():
        theirs = unet_by_hand(pipe.unet, x, float(timestep), TEXT, pipe.added, **changes)
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_without_time_it_is_the_plain_call_bit_for_bit_and_nothing_stays(some):
    x = latents(19, 12)
    plain, before = predict(some, x), state_of(some.unet)
    with hidiffusion(some, t1=0.0, t2=0.0):
        assert torch.equal(predict(some, x), plain)
    convolution = some.unet.down_blocks[0].downsamplers[0].conv
    with pytest.raises(RuntimeError), hidiffusion(some, t2=0.4):
        predict(some, x, encoder_attention_mask=torch.ones(3, 7))
    assert state_of(some.unet) == before and torch.equal(predict(some, x), plain)
    assert (convolution.stride, convolution.padding, convolution.dilation) == ((2, 2), (1, 1), (1, 1))


def test_a_controlnet_is_a_raunet_as_far_as_it_goes(with_controlnet):  # noqa: F811
    pipe, x = with_controlnet, latents(18, 13)
    with torch.no_grad():
        with hidiffusion(pipe, t1=0.4, t2=0.4):
            ours = predict(pipe, x, **controlled(pipe, x))
        changes = SD[0] | SD[1]
        residuals = controlnet_by_hand(pipe.controlnet, x, 900.0, TEXT, HINT, **changes)
        theirs = unet_by_hand(pipe.unet, x, 900.0, TEXT, residuals=residuals, **changes)
    assert torch.allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("loaded_within", [False, True])
def test_a_lora_of_the_convolutions_is_spread_with_them(sd, loaded_within):
    pipe = SimpleNamespace(unet=small_unet(False), scheduler=sd.scheduler, added=None)
    x = latents(20, 14)
    lora = LoraConfig(r=2, target_modules=r".*(down|up)samplers\.0\.conv", init_lora_weights=False)
    torch.manual_seed(0)
    if loaded_within:
        with hidiffusion(pipe):
            pipe.unet.add_adapter(lora)
            ours = predict(pipe, x)
    else:
        pipe.unet.add_adapter(lora)
        with hidiffusion(pipe):
            ours = predict(pipe, x)
    pipe.unet.double().fuse_lora()
    with torch.no_grad():
        whole = unet_by_hand(plain_of(pipe.unet), x, 900.0, TEXT, sampled=0)
        bare = unet_by_hand(sd.unet, x, 900.0, TEXT, sampled=0)
    assert torch.allclose(ours, whole, atol=1e-6) and not torch.allclose(ours, bare, atol=1e-4)


def plain_of(unet):
    """The UNet with a fused LoRA's weights, and no LoRA."""
    plain = small_unet(False)
    state = {name.replace("base_layer.", ""): value for name, value in unet.state_dict().items() if "lora" not in name}
    plain.load_state_dict(state)
    return plain


def test_the_switches_go_by_the_size():
    assert switches((128, 128), (64, 64)) == {"t1": 0.4, "t2": 0.0} == {k: DEFAULTS[k] for k in ("t1", "t2")}
    assert switches((255, 256), (64, 64)) == switches((64, 512), (64, 64)) == {"t1": 0.4, "t2": 0.0}
    assert switches((256, 320), (64, 64)) == {"t1": 0.7, "t2": 0.3}


@pytest.mark.parametrize("own, changes", [(8, {}), (4, {"sampled": 0}), (2, {"sampled": 0, "pooled": 1})])
def test_a_tile_has_the_switches_of_its_own_size_and_not_the_canvas_s(sd, own, changes):
    x = latents(32, 16)
    with tiled_diffusion(sd, tile_width=8, tile_height=8, overlap=0, weights="uniform"), hidiffusion(sd, own=own):
        ours = predict(sd, x, 750.0)
    with torch.no_grad():
        theirs = unet_by_hand(sd.unet, x[..., 8:16, :8], 750.0, TEXT, **changes)
    assert torch.allclose(ours[..., 8:16, :8], theirs, atol=1e-5)


@pytest.mark.parametrize(
    "options, rule", [({"t1": 1.5}, "0 to 1"), ({"t2": -0.1}, "0 to 1"), ({"t1": 0.2, "t2": 0.3}, "not be above t1")]
)
def test_options_that_cannot_work_are_refused_before_anything_is_changed(sd, options, rule):
    before = state_of(sd.unet)
    with pytest.raises(BadInput, match=rule), hidiffusion(sd, **options):
        pass
    assert state_of(sd.unet) == before


def test_a_unet_that_has_no_such_blocks_is_refused(tiny_sdxl):
    before = state_of(tiny_sdxl.unet)
    with pytest.raises(BadInput, match="use deep_shrink"), hidiffusion(tiny_sdxl):
        pass
    assert state_of(tiny_sdxl.unet) == before
