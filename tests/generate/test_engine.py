"""An engine loads what differs and nothing else, is watched and ended within a tile, and forgets what it has undone."""

import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.generate import alternatives, engine
from sd_hyena.generate.alternatives import check_target
from sd_hyena.generate.engine import Engine, NotDrawn
from sd_hyena.generate.generation import generate
from sd_hyena.generate.kept import Kept
from sd_hyena.generate.watch import Cancelled, Watch
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.checkpoint import ANCESTOR, StudentFile, load_students, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01, OUT11

PLAIN = GenerateConfig(width=64, steps=2, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle on blue")
TILED = replace(
    PLAIN, width=128, height=128, tiled_diffusion="multidiffusion", tile_width=8, tile_height=8, tile_batch_size=1
)


class Noted(Watch):
    """Keeps what it is told, and ends the drawing when `end` says so."""

    def __init__(self, end=lambda told: False):
        self.told, self.shapes, self.end = [], [], end

    def step(self, done, total, latents):
        self.told.append((done, total))
        self.shapes.append(None if latents is None else tuple(latents.shape))

    def cancelled(self):
        return self.end(self.told)


@pytest.fixture
def loads(monkeypatch):
    """How often pipelines and files of students are loaded."""
    counted = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counting(*args, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    count(engine, "load_pipeline")
    count(alternatives, "load_students")
    return counted


def students(path, site, seed):
    torch.manual_seed(seed)
    short = {IN01: "IN01", OUT11: "OUT11"}[site]
    save_students(path, StudentFile({site: build_student(StudentSpec(site, short, 32, "pointwise", {}, None))}))
    return str(path)


def pixels(engine, config, watch=None):
    return [np.array(drawn.image) for drawn in engine.draw(config, watch)]


def test_only_what_differs_is_loaded(loads, tmp_path):
    own, (a, b) = Engine(), (students(tmp_path / f"{n}.safetensors", IN01, n) for n in (1, 2))
    first = pixels(own, PLAIN)
    other = pixels(own, replace(PLAIN, prompt="a blue square", scheduler="euler", width=96, height=64))
    assert loads == {"load_pipeline": 1} and other[0].shape == (64, 96, 3)
    with_a = pixels(own, replace(PLAIN, hyena=a))
    assert loads == {"load_pipeline": 1, "load_students": 1}
    pixels(own, replace(PLAIN, hyena=f"{b},{a}"))
    assert loads == {"load_pipeline": 1, "load_students": 2}
    os.utime(b, (1, 1))
    with_b = pixels(own, replace(PLAIN, hyena=b))
    assert loads == {"load_pipeline": 1, "load_students": 3}
    assert np.array_equal(pixels(own, PLAIN), first)
    own.load(replace(PLAIN, dtype="bfloat16"))
    assert loads["load_pipeline"] == 2
    assert np.array_equal(with_a, pixels(Engine(), replace(PLAIN, hyena=a))) and not np.array_equal(with_a, with_b)


def test_loras_and_embeddings_come_and_go_without_a_trace(loads, tmp_path):
    torch.manual_seed(0)
    layer = f"unet.{IN01}.to_q.lora_"
    lora = {f"{layer}A.weight": torch.randn(2, 32), f"{layer}B.weight": torch.randn(32, 2)}
    save_file(lora, tmp_path / "lora.safetensors")
    save_file({"emb_params": torch.randn(2, 96)}, tmp_path / "novel.safetensors")
    with_lora = replace(PLAIN, lora=f"{tmp_path / 'lora.safetensors'}:0.7")
    with_word = replace(PLAIN, prompt="a novel circle", embeddings=str(tmp_path / "novel.safetensors"))
    configs = [PLAIN, with_lora, PLAIN, with_word, PLAIN, replace(with_word, embeddings="")]
    own = Engine()
    drawn = [pixels(own, config) for config in configs]
    assert loads == {"load_pipeline": 1}
    alone = {config: pixels(Engine(), config) for config in dict.fromkeys(configs)}
    for picture, config in zip(drawn, configs, strict=True):
        assert np.array_equal(picture, alone[config])
    assert not any(np.array_equal(drawn[0], drawn[i]) for i in (1, 3))
    assert not np.array_equal(drawn[3], drawn[5])


def test_the_steps_that_are_told_grow_within_a_step_of_tiles_and_end_with_the_total():
    watch, untiled = Noted(), Noted()
    own = Engine()
    pixels(own, TILED, watch)
    done = [done for done, _ in watch.told]
    assert done == sorted(done) and {total for _, total in watch.told} == {3}
    assert done[-1] == 3 and sum(n < 1 for n in done) == 8  # of the nine tiles of 16 x 16 cells, one at a time
    assert watch.shapes[-1] == (1, 4, 16, 16)
    pixels(own, PLAIN, untiled)
    assert [done for done, _ in untiled.told] == [1, 2, 3]


def test_every_pass_of_a_comparison_and_of_a_noise_inversion_counts(tmp_path):
    a = students(tmp_path / "a.safetensors", IN01, 1)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    watch, inverted, own = Noted(), Noted(), Engine()
    (drawn,) = own.draw(replace(PLAIN, hyena=a, compare=True), watch)
    assert [done for done, _ in watch.told] == [1, 2, 3, 4, 5, 6] and watch.told[-1][1] == 6
    assert np.array_equal(np.array(drawn.teacher), pixels(own, PLAIN)[0])
    again = replace(PLAIN, init_image=str(tmp_path / "red.png"), steps=4, strength=0.5, noise_inversion=3)
    pixels(own, again, inverted)
    assert [done for done, _ in inverted.told] == [1, 2, 3, 4, 5, 6] and inverted.told[-1][1] == 6


def test_a_drawing_is_ended_within_one_tile_and_the_engine_goes_on():
    own, calls, watch = Engine(), [], Noted()
    own.load(TILED).pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    expected = pixels(own, TILED, watch)
    whole = len(calls)
    in_the_second_picture = Noted(end=lambda told: len(told) == len(watch.told) + 5)
    kept, drawing = [], own.draw(replace(TILED, num_images=3), in_the_second_picture)
    calls.clear()
    with pytest.raises(Cancelled):
        for drawn in drawing:
            kept.append(np.array(drawn.image))
    assert np.array_equal(kept, expected)
    assert len(calls) == whole + 6
    assert np.array_equal(pixels(own, TILED), expected)


def test_a_drawing_in_tiles_of_the_vae_is_ended_within_one_of_them():
    own = Engine()
    config = replace(PLAIN, width=128, tiled_vae="exact", decoder_tile_size=4)
    reference = pixels(own, config)
    watch = Noted(end=lambda told: bool(told) and told[-1][0] > 2.1)
    with pytest.raises(Cancelled):
        pixels(own, config, watch)
    assert 2.1 < watch.told[-1][0] < 2.3
    assert np.array_equal(pixels(own, config), reference)


def test_two_drawings_at_once_are_refused_and_one_that_is_left_gives_way():
    own = Engine()
    left = own.draw(replace(PLAIN, num_images=2))
    next(left)
    with pytest.raises(RuntimeError, match="drawing already"):
        next(own.draw(PLAIN))
    left.close()
    assert len(pixels(own, PLAIN)) == 1


def test_a_failed_picture_leaves_the_engine_usable(monkeypatch):
    own = Engine()
    first = pixels(own, PLAIN)
    vae = own.load(PLAIN).pipe.vae
    with monkeypatch.context() as patched:
        patched.setattr(vae, "decode", lambda _: (_ for _ in ()).throw(FloatingPointError("injected")))
        with pytest.raises(NotDrawn, match="1 of 1 images failed; image 0: injected"):
            pixels(own, PLAIN)
    assert np.array_equal(pixels(own, PLAIN), first)


def test_a_preview_shows_the_colours_of_the_picture_without_the_vae(monkeypatch):
    own, last = Engine(), Noted()
    last.step = lambda done, total, latents: setattr(last, "latents", latents)
    with pytest.raises(RuntimeError, match="no model is loaded"):
        own.preview(torch.zeros(4, 8, 8))
    (drawn,) = own.draw(replace(PLAIN, width=128, height=64, steps=12, cfg_scale=5.0), last)
    preview = own.preview(last.latents[0])
    assert preview.size == (16, 8)
    small = np.array(drawn.image.resize((16, 8), Image.Resampling.BOX)).astype(float)
    mean = small.mean(axis=(0, 1))
    assert ((np.array(preview) - small) ** 2).mean() < 0.5 * ((mean - small) ** 2).mean()
    fits = []
    monkeypatch.setattr(engine, "fitted", lambda pipe: fits.append(1))
    own.preview(last.latents[0])
    assert not fits


def test_the_memory_of_ten_drawings_is_that_of_two(tmp_path):
    own = Engine()

    def resident() -> int:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1])

    files = [students(tmp_path / f"{n}.safetensors", (IN01, OUT11)[n % 2], n) for n in range(10)]
    used = []
    for file in files:
        pixels(own, replace(PLAIN, hyena=file, steps=1))
        used.append(resident())
    assert used[9] <= 1.05 * used[1]


def test_what_is_kept_is_exited_in_reverse_before_anything_new_is_entered():
    said = []

    class Part:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            said.append(f"+{self.name}")
            return self.name

        def __exit__(self, *_):
            said.append(f"-{self.name}")

    kept = Kept()
    for round_ in ("ab", "abc", "c", "cd"):
        kept.only(round_)
        assert [kept.get(name, lambda name=name: Part(name)) for name in round_] == list(round_)
    assert said == ["+a", "+b", "+c", "-b", "-a", "+d"]


def test_generate_with_an_engine_writes_the_same_files(loads, tmp_path):
    own = Engine()
    paths = [
        generate(replace(PLAIN, out_dir=str(tmp_path / name)), engine)[0]
        for name, engine in (("a", own), ("b", own), ("c", None))
    ]
    assert loads["load_pipeline"] == 2
    first, *others = (np.array(Image.open(path)) for path in paths)
    assert all(np.array_equal(first, other) for other in others)


def test_a_site_beside_files_that_name_their_own_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    save_students(path, StudentFile({IN01: build_student(StudentSpec(IN01, "IN01", 32, "pointwise", {}, None))}))
    with pytest.raises(BadInput, match=r"target='XX99': .*\(IN01\); leave -t away"):
        next(Engine().draw(replace(PLAIN, hyena=str(path), target="XX99")))
    file = load_students(path)
    check_target("in01", {"a": file})
    file.training |= {"origin": ANCESTOR}
    check_target("OUT11", {"a": file})  # it does not say, so it is told
    check_target("OUT11", {})
