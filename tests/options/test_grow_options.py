"""--grow_options: what each way to grow can be told, declared once, strictly read, in the picture."""

import dataclasses
import inspect

import numpy as np
import pytest
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata
from sd_hyena.generate import order
from sd_hyena.generate.generation import generate
from sd_hyena.generate.order import Order
from sd_hyena.large.growing.deep_shrink import DeepShrink
from sd_hyena.large.growing.demofusion import DemoFusion
from sd_hyena.large.growing.diffusehigh import DiffuseHigh
from sd_hyena.large.growing.hidiffusion import HiDiffusion
from sd_hyena.options import grow_options, help
from sd_hyena.options.command_line import parse
from sd_hyena.options.effect import in_vain
from sd_hyena.options.generate_config import GenerateConfig

KINDS = {"diffusehigh": DiffuseHigh, "demofusion": DemoFusion, "deep_shrink": DeepShrink, "hidiffusion": HiDiffusion}
OURS = {"own", "circular", "map", "tile_batch_size"}  # which other options say
BY_THE_SIZE = {"steps", "dilation", "t1", "t2", "aggressive"}


@pytest.mark.parametrize("method", KINDS)
def test_every_parameter_of_a_method_can_be_given_and_has_its_default(method):
    fields = {f.name: f.default for f in dataclasses.fields(KINDS[method]) if f.name not in OURS}
    assert grow_options.OPTIONS[method].keys() == fields.keys()
    for name, option in grow_options.OPTIONS[method].items():
        assert name in BY_THE_SIZE or option.default == fields[name]
    listed = help.text(GenerateConfig, everything=True)
    assert all(f"{name}=" in listed for name in fields)
    assert inspect.isclass(KINDS[method])


@pytest.mark.parametrize(
    "method, text, rule",
    [
        ("demofusion", "c4=1", "grow=demofusion has no 'c4'; it has dilation, c1, c2, c3, sigma"),
        ("deep_shrink", "factor", "is not of the form key=value"),
        ("deep_shrink", "factor=2,factor=3", "factor is given twice"),
        ("deep_shrink", "block=x", "block='x' must be a whole number from 1"),
        ("hidiffusion", "c1=2", "grow=hidiffusion has no 'c1'"),
        ("redraw", "c1=2", "grow=redraw has no 'c1'; it has no options"),
        ("auto", "c1=2", "grow=redraw has no 'c1'"),
    ],
)
def test_what_a_method_does_not_have_is_refused_in_one_line(method, text, rule):
    with pytest.raises(BadInput, match=rule.replace("(", r"\(")) as error:
        GenerateConfig(grow=method, grow_options=text)
    assert "\n" not in str(error.value)


def test_what_a_method_cannot_work_with_is_refused_before_a_model_is_loaded():
    for method, text, rule in (
        ("deep_shrink", "factor=17.0", "1 to 16"),
        ("demofusion", "c1=-1.0", "c1=-1.0"),
        ("diffusehigh", "levels=7", "levels=7"),
        ("hidiffusion", "t1=0.2,t2=0.3", "not be above t1"),
    ):
        with pytest.raises(BadInput, match=rule):
            Order.of(GenerateConfig(width=512, grow=method, grow_options=text))


@pytest.mark.usefixtures("loaded_once")
def test_the_shortest_form_is_in_the_picture_acts_and_repeats_it(tmp_path, monkeypatch):
    monkeypatch.setattr(order, "own_side", lambda _: 80)
    given = dict(width=104, height=72, steps=1, num_images=1, seed=11, prompt="a red circle", out_dir=str(tmp_path))
    drawn = lambda **more: generate(GenerateConfig(**given | more))[0]
    (plain, path) = (
        drawn(grow="deep_shrink", grow_options=text) for text in ("end=0.35,block=3", " factor = 3.5, block=3")
    )
    assert read_metadata(plain)["config"]["grow_options"] == ""
    assert read_metadata(path)["config"]["grow_options"] == "factor=3.5"
    pixels = lambda file: np.array(Image.open(file))
    assert not np.array_equal(pixels(plain), pixels(path))
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert np.array_equal(pixels(generate(again)[0]), pixels(path))
    off = parse(GenerateConfig, ["--from", str(path), "--grow", "off"])
    assert off.grow_options == "factor=3.5" and "grow_options='factor=3.5' has no effect" in "".join(in_vain(off))
    unmoved = drawn(grow="deep_shrink", grow_options="end=0")
    assert np.array_equal(pixels(unmoved), pixels(drawn(grow="off")))  # it never acts
