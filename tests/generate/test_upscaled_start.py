"""--upscaler: the picture to start from is enlarged by a model, which the engine keeps; the PNG says which."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.framed import framed
from sd_hyena.files.picture_text import read_texts
from sd_hyena.generate import engine as engine_module
from sd_hyena.generate import order
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.generation import generate
from sd_hyena.generate.watch import Cancelled, Watch
from sd_hyena.large.enlargement import enlarge
from sd_hyena.models.upscaler import load_upscaler
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from tests.gate import gated
from tests.upscalers import compact, esrgan

PLAIN = GenerateConfig(
    width=64, steps=4, strength=0.5, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle", device="cpu"
)


class Noted(Watch):
    def __init__(self, end=lambda told: False):
        self.told, self.notes, self.end = [], [], end

    def step(self, done, total, latents):
        self.told.append((done, total))

    def note(self, line):
        self.notes.append(line)

    def cancelled(self):
        return self.end(self.told)


@pytest.fixture(scope="module")
def own():
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def start(tmp_path, spandrel):
    """A config that enlarges a small picture by a model."""
    noise = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((30, 33), Image.Resampling.BICUBIC).save(tmp_path / "start.png")
    torch.save(compact(2).state_dict(), tmp_path / "twice.pth")
    torch.save(esrgan(4).state_dict(), tmp_path / "four.pth")
    start, model = tmp_path / "start.png", tmp_path / "twice.pth"
    return replace(PLAIN, init_image=str(start), upscaler=str(model), resize="stretch")


def drawn(engine: Engine, config: GenerateConfig, watch: Watch | None = None) -> np.ndarray:
    (one,) = engine.draw(config, watch)
    return np.array(one.image)


def test_it_starts_from_what_the_model_makes_of_the_picture(own, start, tmp_path):
    by_model, plain = drawn(own, start), drawn(own, replace(start, upscaler=""))
    upscaler = load_upscaler(start.upscaler, torch.device("cpu"), torch.float32)
    enlarge(Image.open(start.init_image), (64, 64), upscaler).save(tmp_path / "large.png")
    assert np.array_equal(by_model, drawn(own, replace(start, upscaler="", init_image=str(tmp_path / "large.png"))))
    assert not np.array_equal(by_model, plain)


@pytest.mark.parametrize("resize", [*gated(["crop"]), "fit"])
def test_a_start_of_another_shape_is_framed_before_the_model_enlarges_it(own, start, tmp_path, resize):
    framed_first = framed(Image.open(start.init_image), {"crop": (30, 30), "fit": (33, 33)}[resize], resize)
    upscaler = load_upscaler(start.upscaler, torch.device("cpu"), torch.float32)
    enlarge(framed_first, (64, 64), upscaler).save(tmp_path / "large.png")
    plain = replace(start, upscaler="", init_image=str(tmp_path / "large.png"))
    assert np.array_equal(drawn(own, replace(start, resize=resize)), drawn(own, plain))


def test_it_is_loaded_once_until_its_file_changes_and_without_another_pipeline(start, monkeypatch, tmp_path):
    loads, own = Counter(), Engine()  # one of its own
    for module, name in ((order, "load_upscaler"), (engine_module, "load_pipeline")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, original=original: loads.update([name]) or original(*a))
    start = replace(start, steps=2)
    drawn(own, start)
    drawn(own, replace(start, seed=3))
    assert loads == {"load_upscaler": 1, "load_pipeline": 1}
    os.utime(start.upscaler, (1, 1))
    drawn(own, start)
    drawn(own, replace(start, upscaler=str(tmp_path / "four.pth")))
    assert loads == {"load_upscaler": 3, "load_pipeline": 1}
    own.close()


def test_the_picture_says_which_and_repeats_bit_for_bit(own, start, tmp_path):
    first = replace(start, out_dir=str(tmp_path))
    (path,) = generate(first, own)
    assert ", Denoising strength: 0.5, Upscaler: twice," in read_texts(path)["parameters"]
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path)])
    assert again.upscaler == start.upscaler
    (repeated,) = generate(again, own)
    assert repeated != path and np.array_equal(np.array(Image.open(path)), np.array(Image.open(repeated)))


def test_the_enlargement_counts_as_a_step_and_is_ended_within_a_tile(own, start):
    watch = Noted()
    drawn(own, start, watch)  # 30 -> 60 -> 120 px, a tile each
    assert [done for done, _ in watch.told] == [0.5, 1, 1, 2, 3, 4] and {total for _, total in watch.told} == {4}
    large = replace(start, width=960, height=64, tiled_vae="off")
    ended = Noted(end=lambda told: len(told) == 1)
    with pytest.raises(Cancelled):
        drawn(own, large, ended)
    assert 0 < ended.told[-1][0] < 1
    assert drawn(own, start).shape == (64, 64, 3)


def test_a_picture_that_is_large_enough_leaves_it_nothing_to_do_and_that_is_said(own, start, tmp_path):
    Image.open(start.init_image).resize((80, 64)).save(tmp_path / "large.png")
    watch = Noted()
    large = replace(start, init_image=str(tmp_path / "large.png"))
    assert np.array_equal(drawn(own, large, watch), drawn(own, replace(large, upscaler="")))
    (line,) = (line for line in watch.notes if "upscaler" in line)
    assert "has no effect here: init_image is 80x64, the picture 64x64" in line


def test_a_wrong_file_is_refused_before_a_model_is_loaded(start, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(3)}, tmp_path / "wrong.pth")
    monkeypatch.setattr(engine_module, "load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(BadInput, match="is no upscaler model that is known here"):
        drawn(Engine(), replace(start, upscaler=str(tmp_path / "wrong.pth")))


def test_a_mask_and_an_upscaler_go_together(own, start, tmp_path):
    half = np.zeros((30, 30), np.uint8)
    half[:, 15:] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    masked = drawn(own, replace(start, mask=str(tmp_path / "mask.png")))
    upscaler = load_upscaler(start.upscaler, torch.device("cpu"), torch.float32)
    large = np.array(enlarge(Image.open(start.init_image), (64, 64), upscaler))
    assert np.array_equal(masked[:, :28], large[:, :28]) and not np.array_equal(masked[:, 36:], large[:, 36:])
