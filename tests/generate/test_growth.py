"""A picture that grows: stages that are ordinary drawings, told, kept, repeated, ended as such."""

import json
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import read_metadata, write_image
from sd_hyena.generate import engine, growth, order
from sd_hyena.generate.alternatives import kept_in
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.generation import generate
from sd_hyena.generate.growth import ANOTHER_NOISE, STRENGTH, Stage, sizes_of
from sd_hyena.generate.job import Job
from sd_hyena.generate.watch import Cancelled, Watch
from sd_hyena.large.enlargement import enlarge
from sd_hyena.options import given_path
from sd_hyena.options.command_line import parse
from sd_hyena.options.effect import in_vain
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.growing import method_of
from sd_hyena.options.infotext import options
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01
from tests.gate import gated

OWN = 80
pytestmark = pytest.mark.usefixtures("small_model", "loaded_once")


@pytest.fixture
def small_model(monkeypatch):
    """The shipped model as if it had been trained at 80 px, so that 128 px are large."""
    monkeypatch.setattr(order, "own_side", lambda _: OWN)


def config(tmp_path, **given):
    small = dict(width=128, height=96, steps=5, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle on blue")
    return GenerateConfig(**small | dict(out_dir=str(tmp_path / "images"), grow="redraw") | given)


def pixels(path):
    return np.array(Image.open(path))


def drawn(tmp_path, **given):
    return pixels(generate(config(tmp_path, **given))[-1])


class Told(Watch):
    def __init__(self, end=lambda told: False):
        self.steps, self.notes, self.sizes, self.end = [], [], [], end

    def step(self, done, total, latents):
        self.steps.append((done, total))
        self.sizes.append(tuple(latents.shape[-2:]))

    def cancelled(self):
        return self.end(self)

    def note(self, line):
        self.notes.append(line)


def test_redraw_is_what_one_would_do_by_hand_and_its_picture_repeats_it_without_being_told(tmp_path):
    small = dict(width=104, height=72, steps=4)
    (path,) = generate(config(tmp_path, **small))
    (first,) = generate(config(tmp_path, width=96, height=64, steps=4, grow="off"))
    by_hand = tmp_path / "enlarged.png"
    Image.open(first).resize((104, 72), Image.Resampling.LANCZOS).save(by_hand)
    start = dict(init_image=str(by_hand), strength=STRENGTH["redraw"], seed=(11 + ANOTHER_NOISE) % 2**32, grow="off")
    assert np.array_equal(drawn(tmp_path, **small | start), pixels(path))
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert again.grow == "redraw" and np.array_equal(pixels(generate(again)[0]), pixels(path))
    plain = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again"), "--grow", "off"])
    assert not np.array_equal(pixels(generate(plain)[0]), pixels(path))


def test_what_is_far_beyond_the_model_s_size_is_drawn_anew_by_half_as_much_unless_it_is_told(tmp_path):
    def strengths(method="redraw", **given):
        stages = Stage.all_of(config(tmp_path, width=320, height=320, steps=20, **given), OWN, method)
        return [stage.config.strength for stage in stages[1:]]

    assert sizes_of(config(tmp_path, width=320, height=320), OWN, "redraw") == [(80, 80), (160, 160), (320, 320)]
    assert (strengths(), strengths(grow_strength=0.4), strengths("diffusehigh")) == (
        [0.3, 0.15],
        [0.4, 0.4],
        [0.3, 0.3],
    )
    assert strengths(hires=1.5) == [0.3]  # a size that somebody chose
    found = parse(GenerateConfig, ["--from", str(generate(config(tmp_path, width=176, height=176, steps=1))[0])])
    assert found.grow_strength == 0.0  # no one number says both


def test_auto_grows_large_canvases_alone_and_says_so(tmp_path):
    at = lambda **given: method_of(config(tmp_path, grow="auto", **given), OWN)
    assert at(width=120, height=120) == "off" and at(width=128, height=120) == "redraw"
    assert at(width=192, height=64) == "off"  # the area counts
    (tmp_path / "regions.json").write_text("[]")
    assert at(init_image="x.png") == at(regions=str(tmp_path / "regions.json")) == "off"
    assert method_of(config(tmp_path, grow="off"), OWN) == "off"
    watch = Told()
    list(Engine().draw(config(tmp_path, grow="auto", width=256, height=128, steps=3), watch))
    assert "growing by redraw, 112x64 -> 168x88 -> 256x128 px; --grow off draws it plainly" in watch.notes


def test_a_picture_of_before_there_was_growing_is_drawn_plainly(tmp_path):
    (path,) = generate(config(tmp_path, grow="off"))
    stored = read_metadata(path)["config"]
    assert stored["grow"] == "off"
    del stored["grow"]
    old = write_image(tmp_path / "old.png", Image.open(path), "", {"config": stored})
    assert parse(GenerateConfig, ["--from", str(old)]).grow == "off"


def test_each_stage_is_told_and_kept_and_the_pictures_of_those_that_were_done_outlive_an_end(tmp_path):
    given = config(tmp_path, width=184, height=184, steps=3, save_stages=True, tiled_diffusion="off")
    in_the_third = Told(lambda told: told.sizes[-1:] == [(23, 23)])
    with pytest.raises(Cancelled):
        generate(given, watch=in_the_third)
    left = sorted((tmp_path / "images").glob("*.png"))
    assert [path.name for path in left] == ["image_000-stage1.png", "image_000-stage2.png"]
    assert [Image.open(path).size for path in left] == [(80, 80), (120, 120)]
    assert read_metadata(left[1])["stage"] == 2
    whole = Told()
    paths = generate(parse(GenerateConfig, ["--from", str(left[1]), "-o", str(tmp_path / "whole")]), watch=whole)
    assert [path.name for path in paths] == ["image_000.png", "image_000-stage1.png", "image_000-stage2.png"]
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(left, paths[1:], strict=True))
    done = [done for done, _ in whole.steps]
    assert done == sorted(done) and {total for _, total in whole.steps} == {done[-1]} == {3 + 1 + 2 * (1 + 1)}


@pytest.mark.parametrize("method", ["diffusehigh", *gated(["redraw", "demofusion"])])
def test_a_picture_does_not_depend_on_its_batch(tmp_path, method):
    given = dict(grow=method, num_images=2, width=104, height=72, steps=4)
    together = [pixels(path).astype(int) for path in generate(config(tmp_path, batch_size=2, **given))]
    alone = [pixels(path) for path in generate(config(tmp_path, **given))]
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(together, alone, strict=True))
    assert not np.array_equal(*alone)


@pytest.mark.parametrize("method", [*gated(["diffusehigh", "demofusion", "hidiffusion"]), "deep_shrink"])
def test_each_method_draws_another_picture_and_leaves_nothing_behind(tmp_path, own_pipe, method):
    small = dict(width=104, height=72, steps=2)
    plain = drawn(tmp_path, grow="off", **small)
    (path,) = generate(config(tmp_path, grow=method, **small))
    others = [plain, drawn(tmp_path, grow="redraw", **small)]
    assert not any(np.array_equal(pixels(path), other) for other in others)
    assert np.array_equal(drawn(tmp_path, grow="off", **small), plain)
    again = parse(GenerateConfig, ["--from", str(path), "-o", str(tmp_path / "again")])
    assert np.array_equal(pixels(generate(again)[0]), pixels(path))


def student(tmp_path, operator="pointwise", size=None):
    torch.manual_seed(0)
    spec = StudentSpec(IN01, "IN01", 32, operator, {}, size)
    save_students(tmp_path / f"{operator}.safetensors", StudentFile({IN01: build_student(spec)}))
    return str(tmp_path / f"{operator}.safetensors")


def test_students_work_in_every_stage_beside_a_teacher_that_grows_by_itself(tmp_path):
    hyena, small = student(tmp_path), dict(width=104, height=72, steps=2)
    path, beside = generate(config(tmp_path, hyena=hyena, compare=True, **small))
    teacher, drawn_, _ = np.split(pixels(beside), 3, axis=1)
    assert np.array_equal(drawn_, pixels(path)) and np.array_equal(teacher, drawn(tmp_path, **small))
    assert np.array_equal(drawn(tmp_path, hyena=hyena, **small), pixels(path))


def test_which_sites_keep_their_attention_is_told_for_each_stage(tmp_path, monkeypatch):
    asked = []

    def kept(alternative, unet, wanted, tile, batch):
        asked.append((wanted, tile))
        return replace(alternative, students={}, kept=("IN01",)) if tile == (9, 12) else alternative

    monkeypatch.setattr(engine, "keep_attention", kept)
    (path,) = generate(config(tmp_path, hyena=student(tmp_path), keep_attention="auto", steps=3))
    assert asked == [("auto", (9, 12)), ("auto", (12, 16))]
    assert read_metadata(path)["config"]["keep_attention"] == "auto:IN01;"
    asked.clear()
    for more, there in (([], [("IN01", (9, 12)), ("", (12, 16))]), (["--grow", "off"], [("auto", (12, 16))])):
        list(Engine().draw(parse(GenerateConfig, ["--from", str(path), *more]), Told()))
        assert asked == there  # of one stage it is measured anew
        asked.clear()
    assert kept_in("auto:IN01;", 3) == ["auto"] * 3
    asked.clear()
    list(Engine().draw(config(tmp_path, hyena=student(tmp_path), keep_attention="IN01;", steps=3), Told()))
    assert asked == [("IN01", (9, 12)), ("", (12, 16))]
    with pytest.raises(BadInput, match="3 stages, this picture has 2"):
        list(Engine().draw(config(tmp_path, hyena=student(tmp_path), keep_attention="IN01;;"), Told()))


def test_a_student_of_one_size_is_drawn_with_plainly_unless_growing_is_asked_for(tmp_path):
    hyena = student(tmp_path, "causal", (12, 16))
    auto, off = (drawn(tmp_path, hyena=hyena, grow=method, steps=1) for method in ("auto", "off"))
    assert np.array_equal(auto, off)
    with pytest.raises(BadInput, match="trained at 128x96"):
        generate(config(tmp_path, hyena=hyena))


def test_hires_is_a_redraw_in_a1111_s_words(tmp_path):
    given = dict(width=80, height=64, steps=3, hires=1.5, grow_strength=0.55, grow_steps=2, grow="auto")
    (path,) = generate(config(tmp_path, **given))
    assert pixels(path).shape == (96, 120, 3)
    text = Image.open(path).info["parameters"]
    for words in (
        "Size: 80x64",
        "Hires upscale: 1.5",
        "Hires steps: 2",
        "Denoising strength: 0.55",
        "Hires upscaler: Lanczos",
    ):
        assert words in text
    found = options(text, "x").options
    assert (found["hires"], found["grow_strength"], found["grow_steps"]) == (1.5, 0.55, 2)
    chunk = PngInfo()
    chunk.add_text("parameters", text)
    Image.open(path).save(tmp_path / "a1111.png", pnginfo=chunk)
    again = parse(GenerateConfig, ["--from", str(tmp_path / "a1111.png"), "-o", str(tmp_path / "again")])
    assert np.array_equal(pixels(generate(again)[0]), pixels(path))
    same = config(tmp_path, width=80, height=64, hires=2.0, grow="auto")
    assert sizes_of(same, 16, "redraw") == [(80, 64), (160, 128)]  # one pass, whatever the model's own size


@pytest.mark.gate
def test_so_many_steps_as_asked_for_are_taken_in_the_stages_but_the_first(tmp_path):
    for steps, strength in ((3, 0.3), (7, 0.9), (6, 0.35), (1, 0.05), (0, 0.3)):
        watch = Told()
        list(Engine().draw(config(tmp_path, steps=2, grow_steps=steps, grow_strength=strength), watch))
        assert watch.steps[-1][1] == 2 + 1 + max(steps, 1) + 1


@pytest.mark.parametrize(
    "given, rule",
    [
        (dict(mask="x.png", init_image="x.png"), "draws all of it again"),
        (dict(hires=2.0, grow="demofusion"), "is grow=redraw, not grow=demofusion"),
        (dict(hires=0.5), "hires=0.5"),
        (dict(hires=15.0, width=2048), "larger than 16384 pixels"),
        (dict(grow_strength=1.5), "grow_strength=1.5"),
        (dict(grow="deep_shrink", optimize="graphs"), "changes the UNet from step to step"),
        (dict(grow="off", noise_inversion=3), "needs --init_image too, or --grow redraw"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_drawn(tmp_path, given, rule):
    with pytest.raises(BadInput, match=rule):
        list(Engine().draw(config(tmp_path, **given), Told()))


@pytest.mark.gate
def test_the_noise_of_the_stage_before_can_be_looked_for(tmp_path):
    kept = dict(noise_inversion=4, renoise_strength=0.0, grow_strength=0.8, steps=10)
    small = Image.fromarray(drawn(tmp_path, width=96, height=72, grow="off", steps=10))
    first = np.array(enlarge(small, (128, 96))).astype(int)
    inverted, any_noise = (drawn(tmp_path, **given) for given in (kept, kept | dict(noise_inversion=0)))
    assert np.abs(first - inverted).mean() < np.abs(first - any_noise).mean()


@pytest.mark.parametrize("size", [(64, 48), (16, 12)])
def test_a_circular_picture_is_brought_to_another_size_round_its_borders(size):
    picture = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    turn, turned = (8 * size[1] // 24, 16 * size[0] // 32), np.roll(picture, (8, 16), (0, 1))

    def at_size(pixels, circular):
        return np.array(enlarge(Image.fromarray(pixels), size, circular=circular))

    assert np.array_equal(np.roll(at_size(picture, True), turn, (0, 1)), at_size(turned, True))
    assert not np.array_equal(np.roll(at_size(picture, False), turn, (0, 1)), at_size(turned, False))


class Nearest:
    """An upscaler whose work is known."""

    scale, multiple = 2, 1

    @contextmanager
    def at_work(self):
        yield lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_an_upscaler_stands_between_two_stages(tmp_path, monkeypatch, capsys):
    (tmp_path / "twice.pth").write_bytes(b"")
    monkeypatch.setattr(order, "load_upscaler", lambda *_: Nearest())
    monkeypatch.setattr(given_path, "upscaler", lambda *_: None)
    small = dict(width=104, height=72, steps=4)
    grown = drawn(tmp_path, upscaler=str(tmp_path / "twice.pth"), **small)
    first = Image.fromarray(drawn(tmp_path, grow="off", width=96, height=64, steps=4))
    twice = first.resize((192, 128), Image.Resampling.NEAREST).resize((104, 72), Image.Resampling.LANCZOS)
    twice.save(tmp_path / "by_hand.png")
    again = dict(init_image=str(tmp_path / "by_hand.png"), strength=0.3, seed=(11 + ANOTHER_NOISE) % 2**32, grow="off")
    assert np.array_equal(grown, drawn(tmp_path, **small | again))
    assert not np.array_equal(grown, drawn(tmp_path, **small))


def test_tiles_have_what_was_composed_in_one_piece_drawn_again(tmp_path, monkeypatch):
    """What shrinks maps composes a canvas: in tiles each would be composed by itself."""
    monkeypatch.setattr(order, "own_side", lambda _: 64)
    tiles = dict(tiled_diffusion="mixture", tile_width=12, tile_height=12)
    given = dict(width=144, height=136, steps=2, grow_steps=1)
    watch = Told()
    (path,) = generate(config(tmp_path, grow="deep_shrink", **given, **tiles), watch=watch)
    assert "growing by deep_shrink, 128x128 -> 144x136 px; --grow off draws it plainly" in watch.notes
    (first,) = generate(config(tmp_path, grow="deep_shrink", width=128, steps=2, height=128))
    by_hand = tmp_path / "enlarged.png"
    Image.open(first).resize((144, 136), Image.Resampling.LANCZOS).save(by_hand)
    start = dict(init_image=str(by_hand), strength=STRENGTH["redraw"], seed=(11 + ANOTHER_NOISE) % 2**32, grow="off")
    assert np.array_equal(drawn(tmp_path, **given | dict(steps=4), **tiles, **start), pixels(path))
    again = parse(GenerateConfig, ["--from", str(path)])
    assert (again.grow, again.tiled_diffusion, again.grow_strength) == ("deep_shrink", "mixture", 0.3)
    small, watch = dict(width=104, height=72, steps=2, grow="hidiffusion"), Told()
    (whole,) = generate(config(tmp_path, **small, **tiles | dict(tile_width=8)), watch=watch)
    assert np.array_equal(pixels(whole), drawn(tmp_path, **small))
    assert any(
        "tiled_diffusion=mixture has no effect here, hidiffusion composes in one piece" in n for n in watch.notes
    )


def test_a_canvas_that_the_model_draws_by_itself_is_not_composed_smaller(tmp_path):
    small = dict(width=72, height=80, steps=1)
    plain = drawn(tmp_path, grow="off", **small)
    assert all(np.array_equal(drawn(tmp_path, grow=m, **small), plain) for m in ("deep_shrink", "hidiffusion"))


def write_regions(tmp_path, **region):
    path = tmp_path / "regions.json"
    path.write_text(json.dumps({"bbox_controls": [dict(x=0, y=0, w=1, h=1, blend_mode="Background") | region]}))
    return str(path)


def test_a_region_s_own_guidance_acts_on_each_dilated_sample_by_itself(tmp_path, monkeypatch):
    given = dict(grow="demofusion", width=104, height=72, steps=1)
    regions = write_regions(tmp_path, guidance_scale=1.5, prompt="a yellow square")
    together = drawn(tmp_path, regions=regions, tile_batch_size=4, **given).astype(int)
    alone = drawn(tmp_path, regions=regions, tile_batch_size=1, **given)
    assert np.abs(together - alone).max() <= 1
    asked = []
    monkeypatch.setattr(growth, "demofusion", lambda pipe, **options: asked.append(options) or nullcontext())
    drawn(tmp_path, tile_batch_size=3, **given)
    assert asked[0]["tile_batch_size"] == 3


def test_the_noise_of_a_given_picture_is_looked_for_in_demofusion_s_first_stage_alone(tmp_path):
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (9, 13, 3), np.uint8)).resize((104, 72)).save(
        start := tmp_path / "start.png"
    )
    given = dict(width=104, height=72, steps=2, init_image=str(start), noise_inversion=2)
    path, first = generate(config(tmp_path, grow="demofusion", save_stages=True, **given))
    assert pixels(first).shape == (64, 96, 3) and pixels(path).shape == (72, 104, 3)
    Image.open(start).resize((96, 64), Image.Resampling.LANCZOS).save(smaller := tmp_path / "smaller.png")
    own = given | dict(init_image=str(smaller), width=96, height=64)
    assert np.array_equal(pixels(first), drawn(tmp_path, grow="off", **own))


def test_what_is_given_in_vain_beside_a_way_to_grow_is_told(tmp_path):
    large = dict(width=512, height=512)
    stages = dict(grow_strength=0.5, grow_steps=3, save_stages=True, upscaler="x.pth")
    named = lambda **given: [line.split("=")[0].removeprefix("note: ") for line in in_vain(config(tmp_path, **given))]
    for method in ("deep_shrink", "hidiffusion", "off"):
        assert sorted(named(grow=method, **large, **stages)) == sorted(stages)
    assert named(grow="demofusion", **large, **stages) == ["upscaler"]
    assert named(grow="redraw", **large, **stages) == named(grow="diffusehigh", **large, **stages) == []
    assert sorted(named(grow="redraw", width=256, height=256, **stages)) == sorted(stages)  # the model's own size
    tiles = dict(tiled_diffusion="mixture", tile_width=32, tile_height=32)
    assert named(grow="deep_shrink", width=768, height=768, **stages, **tiles) == []
    assert named(grow="off", hires=2.0, **large) == ["hires"]


def test_what_is_off_is_drawn_plainly_whatever_hires_says(tmp_path):
    small = dict(width=80, height=64, steps=2)
    plain = drawn(tmp_path, grow="off", **small)
    (path,) = generate(config(tmp_path, grow="off", hires=1.5, **small))
    assert np.array_equal(pixels(path), plain) and "Hires" not in Image.open(path).info["parameters"]
    watch = Told()
    (grown,) = generate(config(tmp_path, grow="auto", hires=1.5, **small), watch=watch)
    assert "growing by redraw, 80x64 -> 120x96 px; --grow off draws 80x64 alone" in watch.notes
    again = parse(GenerateConfig, ["--from", str(grown), "--grow", "off", "-o", str(tmp_path / "again")])
    assert np.array_equal(pixels(generate(again)[0]), plain)


@pytest.mark.parametrize("rows", [1, *gated([2])])
def test_a_stage_that_does_not_fit_costs_no_stage_before_it_and_no_picture_is_there_twice(tmp_path, monkeypatch, rows):
    given = dict(width=104, height=72, steps=2, num_images=rows, batch_size=rows, save_stages=True)
    whole = [pixels(path) for path in generate(config(tmp_path / "whole", **given | dict(batch_size=1)))]
    tiled = [pixels(path) for path in generate(config(tmp_path / "tiled", tiled_diffusion="mixture", **given))]
    tried, asked = Job._tried, []

    def full(self, i, alternative, rows_, before, tiled_):
        asked.append((i, len(rows_), tiled_))
        if i == 1 and not tiled_ and (rows == 1 or len(rows_) > 1):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tried(self, i, alternative, rows_, before, tiled_)

    monkeypatch.setattr(Job, "_tried", full)
    watch = Told()
    paths = generate(config(tmp_path, **given), watch=watch)
    assert len(paths) == len(set(paths)) == 2 * rows
    truth = tiled if rows == 1 else whole
    assert all(np.abs(pixels(a).astype(int) - b).max() <= 1 for a, b in zip(paths, truth, strict=True))
    there = [(0, 1, ""), (1, 1, ""), (0, 1, "mixture"), (1, 1, "mixture")]
    assert asked == (there if rows == 1 else [(0, 2, ""), (1, 2, ""), (1, 1, ""), (1, 1, "")])
    assert watch.steps[-1][0] == watch.steps[-1][1]
    assert sorted(paths) == sorted((tmp_path / "images").iterdir())
