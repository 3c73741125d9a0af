"""The VAE nodes against ComfyUI's own untiled VAE."""

import pytest
import torch

from sd_hyena.errors import BadInput
from tests.comfyui import models
from tests.comfyui.engine import call


@pytest.fixture
def vae(running):
    return models.vae_of()


def relative(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


def uneven(*shape):
    """Noise whose mean and strength change from left to right."""
    ramp = torch.linspace(0.1, 1.5, shape[-1])
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * ramp + ramp


@pytest.mark.parametrize("tile", [64, 4096])
def test_an_image_is_decoded_as_by_the_untiled_vae(running, vae, tile):
    z = uneven(2, 4, 19, 27)
    vae.process_output = lambda image: image  # else most of it is clipped
    with torch.inference_mode():
        (got,) = call(running, "HyenaVAEDecode", samples={"samples": z}, vae=vae, tile_size=tile)
        want = torch.cat([vae.decode(one) for one in z.split(1)])
    assert got.shape == (2, 152, 216, 3) and relative(got, want) < 1e-5


@pytest.mark.parametrize("tile", [64, 4096])
def test_an_image_is_encoded_as_by_the_untiled_vae_cropped_as_there(running, vae, tile):
    pixels = uneven(2, 4, 157, 218).movedim(1, -1).clamp(0, 1)  # with an alpha channel, and no multiple of 8
    with torch.inference_mode():
        (got,) = call(running, "HyenaVAEEncode", pixels=pixels, vae=vae, tile_size=tile)
        want = torch.cat([vae.encode(one[..., :3]) for one in pixels.split(1)])
    assert got["samples"].shape == (2, 4, 19, 27) and relative(got["samples"], want) < 1e-5


def test_what_overflows_in_half_precision_is_decoded_in_float32_and_the_weights_stay(running, vae, caplog):
    z = uneven(1, 4, 12, 9)
    vae.first_stage_model.decoder.up[1].block[0].conv1.weight.data *= 1e5
    with torch.inference_mode():
        want = vae.decode(z)
        vae.first_stage_model.half()
        vae.vae_dtype = torch.float16
        before = {name: value.data_ptr() for name, value in vae.first_stage_model.state_dict().items()}
        assert not vae.decode(z).isfinite().all()
        (got,) = call(running, "HyenaVAEDecode", samples={"samples": z}, vae=vae, tile_size=64)
    assert (got - want).abs().max() < 0.02 and "computes this once more in float32" in caplog.text
    assert before == {name: value.data_ptr() for name, value in vae.first_stage_model.state_dict().items()}


def test_memory_is_bounded_by_the_tile_not_by_the_image(running, vae):
    """The largest map that a layer is given stays that of a tile when the image gets four times as large."""
    largest = []

    def note(module, args):
        largest[-1] = max(largest[-1], args[0].numel())

    hooks = [
        m.register_forward_pre_hook(note) for m in vae.first_stage_model.modules() if isinstance(m, torch.nn.Conv2d)
    ]
    with torch.inference_mode():
        for side in (16, 32):
            largest.append(0)
            call(running, "HyenaVAEDecode", samples={"samples": uneven(1, 4, side, side)}, vae=vae, tile_size=64)
        largest.append(0)
        vae.decode(uneven(1, 4, 32, 32))
    for hook in hooks:
        hook.remove()
    assert largest[1] <= 1.1 * largest[0] < 0.2 * largest[2]


def test_the_nodes_bar_moves_to_its_end_and_cancel_stops_within_the_image(running, vae):
    import comfy.model_management
    import comfy.utils

    told = []
    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(lambda done, total, preview, **more: told.append((done, total)))
    try:
        latents = {"samples": uneven(2, 4, 12, 9)}
        call(running, "HyenaVAEDecode", samples=latents, vae=vae, tile_size=64)
        total = told[0][1]
        assert told == [(n, total) for n in range(1, total + 1)] and total > 40
        comfy.utils.set_progress_bar_global_hook(
            lambda done, total, preview, **more: comfy.model_management.interrupt_current_processing(done == 7)
        )
        told.clear()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            call(running, "HyenaVAEDecode", samples=latents, vae=vae, tile_size=64)
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
        comfy.model_management.interrupt_current_processing(False)


def test_other_vaes_are_refused_by_name(running, vae):
    from comfy.taesd.taesd import TAESD

    vae.first_stage_model = TAESD()
    with pytest.raises(BadInput, match=r"this VAE \(TAESD, .*\) is not Stable Diffusion's"):
        call(running, "HyenaVAEDecode", samples={"samples": uneven(1, 4, 9, 9)}, vae=vae, tile_size=0)
    with pytest.raises(BadInput, match=r"TAESD"):
        call(running, "HyenaVAEEncode", pixels=uneven(1, 16, 16, 3), vae=vae, tile_size=0)
    with pytest.raises(BadInput, match=r"\(1, 4, 2, 9, 9\) are no pictures"):
        call(running, "HyenaVAEDecode", samples={"samples": uneven(1, 4, 2, 9, 9)}, vae=models.vae_of(), tile_size=0)
