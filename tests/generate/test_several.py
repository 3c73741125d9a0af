"""Several prompts in one run, the formats of files, the grid, pictures of another shape than the canvas."""

import numpy as np
import pytest
import torch
from PIL import Image

from sd_hyena.errors import BadInput
from sd_hyena.files.grid import grid
from sd_hyena.files.picture import read_metadata, write_image
from sd_hyena.files.picture_text import read_texts
from sd_hyena.generate import engine
from sd_hyena.generate.engine import NotDrawn
from sd_hyena.generate.generation import generate
from sd_hyena.generate.watch import Watch
from sd_hyena.options.command_line import parse, parse_all
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01
from tests.gate import gated

SMALL = dict(width=64, steps=2, num_images=1, cfg_scale=3.0, seed=11, prompt="a red circle on blue")


def config(tmp_path, **options):
    return GenerateConfig(**{**SMALL, "out_dir": str(tmp_path / "images"), **options})


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle on blue\na blue square -- -k 3 -W 72 -H 64\na fox")
    flags = ["-W", "64", "-s", "2", "-c", "3", "-k", "11", "-o", str(tmp_path / "images")]
    return parse_all(GenerateConfig, [*flags, "-p", f"@{tmp_path / 'p.txt'}"])


class Steps(Watch):
    def __init__(self):
        self.steps, self.notes = [], []

    def step(self, done, total, latents):
        self.steps.append(done / total)

    def note(self, line):
        self.notes.append(line)


def test_a_file_of_prompts_is_drawn_with_one_load_and_each_picture_as_alone(tmp_path, lines, own_pipe, monkeypatch):
    loads = []
    monkeypatch.setattr(engine, "load_pipeline", lambda *_: loads.append(1) or own_pipe)
    watch = Steps()
    paths = generate(lines, watch=watch)
    assert [path.name for path in paths] == [f"image_00{n}.png" for n in range(3)] and len(loads) == 1
    assert watch.steps == sorted(watch.steps) and watch.steps[-1] == 1  # one bar for all
    assert len([line for line in watch.notes if " · " in line]) == 3
    alone = [
        generate(config(tmp_path, **more)) for more in ({}, dict(prompt="a blue square", seed=3, width=72, height=64))
    ]
    for path, (other,) in zip(paths[:2], alone, strict=True):
        assert np.array_equal(pixels(path), pixels(other))
    again = parse(GenerateConfig, ["--from", str(paths[1])])
    assert (again.prompt, again.seed, again.num_images) == ("a blue square", 3, 1)


@pytest.mark.usefixtures("loaded_once")
def test_a_line_that_fails_does_not_cost_the_others_and_one_that_cannot_be_drawn_stops_before_the_first(
    tmp_path, lines, own_pipe, monkeypatch
):
    with pytest.raises(BadInput, match="no embedding 'gone'"):
        generate([lines[0], config(tmp_path, prompt="a fox, embedding:gone")])
    assert not (tmp_path / "images").exists()
    decode = own_pipe.vae.decode

    def broken(latents):
        result = decode(latents)
        result.sample = result.sample * float("nan" if latents.shape[-1] == 9 else 1)  # the second line, of 72 px
        return result

    monkeypatch.setattr(own_pipe.vae, "decode", broken)
    with pytest.raises(NotDrawn, match="1 of 3 images failed, the others are in"):
        generate(lines)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["image_000.png", "image_001.png"]


@pytest.mark.usefixtures("loaded_once")
def test_alternatives_times_prompts_are_a_labelled_grid(tmp_path):
    torch.manual_seed(0)
    files = []
    for name in ("first", "second"):
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_students(
            files[-1], StudentFile({IN01: build_student(StudentSpec(IN01, "IN01", 32, "pointwise", {}, None))})
        )
    given = dict(hyena=",".join(files), grid=True, name_format="{h}-{n}")
    *paths, whole = generate([config(tmp_path, **given), config(tmp_path, **given, prompt="a blue square")])
    assert whole.name == "grid.png" and read_texts(whole) == {} and len(paths) == 4
    sheet = pixels(whole)
    places = [_where(sheet, pixels(path)) for path in paths]  # first and second of the one prompt, then of the other
    (a, b), (c, d) = places[:2], places[2:]
    assert a[0] == b[0] < c[0] == d[0] and a[1] == c[1] < b[1] == d[1]
    assert (sheet[: a[0], a[1] :] < 128).any() and (sheet[a[0] :, : a[1]] < 128).any()  # labels above and beside
    assert parse(GenerateConfig, ["--from", str(paths[0])]).grid is False


def _where(sheet: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    """Where the picture stands in the sheet, pixel by pixel."""
    h, w = picture.shape[:2]
    for y, x in zip(*np.nonzero((sheet == picture[0, 0]).all(-1)), strict=True):
        if np.array_equal(sheet[y : y + h, x : x + w], picture):
            return y, x
    pytest.fail("it is not there")


def test_a_grid_of_large_pictures_and_long_labels_stays_small_and_keeps_shapes():
    pictures = {(0, 0): Image.new("RGB", (2048, 1024), "red"), (1, 1): Image.new("RGB", (512, 1024), "blue")}
    open_ = {place: (lambda picture=picture: picture) for place, picture in pictures.items()}
    sheet = np.asarray(grid(open_, ["long " * 99, "b"], ["c", "d" * 99]))
    assert max(sheet.shape) < 1200
    for colour, size in (((255, 0, 0), (256, 512)), ((0, 0, 255), (256, 128))):
        y, x = np.nonzero((sheet == colour).all(-1))
        assert (np.ptp(y) + 1, np.ptp(x) + 1) == size


@pytest.mark.parametrize("format", ["webp", *gated(["jpg"])])
@pytest.mark.usefixtures("loaded_once")
def test_other_formats_carry_the_same_parameters_and_repeat_the_same_picture(tmp_path, format):
    given = dict(prompt="a (fox:1.2), größe 猫\nsecond line", negative_prompt="blur")
    (plain,), (path,) = (generate(config(tmp_path, **given, format=kind)) for kind in ("png", format))
    assert path.name == f"image_001.{format}" and np.abs(pixels(path).astype(int) - pixels(plain)).mean() < 4
    with Image.open(path) as image:
        assert image.format == {"webp": "WEBP", "jpg": "JPEG"}[format]
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == read_texts(plain)["parameters"]
    metadata = read_metadata(plain)
    assert read_metadata(path) == metadata | {"config": metadata["config"] | {"format": format}}
    again = parse(GenerateConfig, ["--from", str(path), "--format", "png", "-o", str(tmp_path / "again")])
    assert np.array_equal(pixels(generate(again)[0]), pixels(plain))


def test_what_does_not_fit_a_format_is_said(tmp_path):
    path = write_image(tmp_path / "x.jpg", Image.new("RGB", (8, 8)), "a" * 40_000, {"config": {"seed": 1}})
    assert path == tmp_path / "x.png" and read_metadata(path) == {"config": {"seed": 1}}
    with pytest.raises(BadInput, match="format=webp ends at 16383 px a side"):
        GenerateConfig(width=16384, format="webp")


@pytest.mark.usefixtures("loaded_once")
def test_a_start_of_another_shape_is_cropped_with_a_note_and_its_mask_with_it(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    Image.fromarray(noise[:, 32:96]).save(tmp_path / "middle.png")
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 48:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:, 32:96]).save(tmp_path / "mask-middle.png")
    watch = Steps()

    def drawn(name, **more):
        given = dict(steps=2, strength=0.5, height=64, init_image=str(tmp_path / name)) | more
        return pixels(generate(config(tmp_path, **given), watch=watch)[0])

    middle = drawn("middle.png")
    assert not any("another shape" in line for line in watch.notes)
    assert np.array_equal(drawn("wide.png"), middle)
    (note,) = (line for line in watch.notes if "another shape" in line)
    assert "init_image is 128x64, of another shape than 64x64, and its middle is drawn again" in note
    masks = [str(tmp_path / name) for name in ("mask.png", "mask-middle.png")]
    assert np.array_equal(drawn("wide.png", mask=masks[0]), drawn("wide.png", mask=masks[1]))
    others = [drawn("wide.png", resize=how) for how in ("fit", "stretch")]
    assert not any(np.array_equal(a, b) for a, b in ((middle, others[0]), (middle, others[1]), others))
    watch.notes.clear()
    drawn("wide.png", width=152, height=0)  # 152x76, rounded to whole cells
    assert not any("another shape" in line for line in watch.notes)
