"""What a growing picture's forecast counts beside the UNet's own stages."""

import dataclasses

import pytest

from sd_hyena.cost.operations import unet_flops, vae_flops
from sd_hyena.generate.forecast import forecast
from sd_hyena.options.generate_config import GenerateConfig

GROWING = GenerateConfig(width=384, height=320, steps=10, cfg_scale=1.0, prompt="x", device="cpu", grow="redraw")


@pytest.mark.gate
def test_held_steps_and_dilated_samples_are_counted(shared_pipe):
    redrawn, held = (forecast(dataclasses.replace(GROWING, grow=method)) for method in ("redraw", "diffusehigh"))
    assert held.operations == redrawn.operations + sum(vae_flops(shared_pipe.vae, (40, 48)))  # one of three steps
    more = forecast(dataclasses.replace(GROWING, grow="diffusehigh", grow_options="steps=2"))
    assert more.operations == redrawn.operations + 2 * sum(vae_flops(shared_pipe.vae, (40, 48)))
    whole = dict(grow="demofusion", tiled_diffusion="multidiffusion", tile_width=64, tile_height=64)
    found = forecast(dataclasses.replace(GROWING, **whole))
    first = forecast(dataclasses.replace(GROWING, grow="off", width=280, height=232))
    unet, decoded = shared_pipe.unet, vae_flops(shared_pipe.vae, (40, 48))[1]
    step = unet_flops(unet, (40, 48)) + 4 * unet_flops(unet, (20, 24))
    assert found.operations == first.operations + 10 * step + decoded


@pytest.mark.gate
def test_what_an_upscaler_takes_is_said_not_to_be_counted(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"")
    said = "the upscaler's own work not counted"
    with_upscaler = dataclasses.replace(GROWING, upscaler=str(tmp_path / "x.pth"))
    assert said in forecast(with_upscaler).line() and said not in forecast(GROWING).line()
    assert said not in forecast(dataclasses.replace(with_upscaler, grow="off")).line()
