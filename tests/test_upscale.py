"""python -m sd_hyena.upscale: a picture or a folder, larger, with what its text says."""

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.__main__ import main as sd_hyena
from sd_hyena.files.picture_text import read_texts
from sd_hyena.large.enlargement import enlarge
from sd_hyena.models.upscaler import load_upscaler
from sd_hyena.upscale import command
from tests.fork import forked
from tests.upscalers import compact

A1111 = "a fox\nSteps: 5, Seed: 3, Size: 20x14"


@pytest.fixture
def folder(tmp_path, spandrel, monkeypatch):
    """With a picture of A1111's, others of other modes, and a model, as the working folder."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (14, 20, 4), dtype=np.uint8)
    info = PngInfo()
    info.add_text("parameters", A1111)
    info.add_itxt("workflow", '{"ü": 1}')
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels[..., :3]).save("in/a.png", pnginfo=info)
    Image.fromarray(pixels).save("in/b.webp", lossless=True)
    Image.fromarray(pixels[..., 0]).save("in/c.PNG")
    torch.save(compact(2).state_dict(), "twice.pth")
    return tmp_path


def test_a_picture_becomes_larger_and_keeps_its_parameters(folder, capsys):
    assert command("in/a.png out/large.png --upscaler twice.pth --scale 4 --device cpu".split()) == 0
    assert capsys.readouterr().out == "out/large.png\n"
    upscaler = load_upscaler("twice.pth", torch.device("cpu"), torch.float32)
    with Image.open("out/large.png") as image, Image.open("in/a.png") as small:
        assert np.array_equal(np.array(image), np.array(enlarge(small, (80, 56), upscaler)))
    texts = read_texts("out/large.png")
    assert texts["parameters"] == A1111 and texts["workflow"] == '{"ü": 1}'
    assert texts["postprocessing"] == "Postprocess upscale by: 4, Postprocess upscaler: twice"


def test_a_folder_becomes_a_folder_and_what_is_no_picture_in_it_is_passed_over_with_a_line(folder, capsys):
    (folder / "in" / "broken.jpg").write_bytes(b"\xff\xd8no")
    (folder / "in" / "notes.txt").write_text("no picture")
    assert sd_hyena("upscale in out --upscaler twice.pth --scale 1.5 --device cpu".split()) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["out/a.png", "out/b.png", "out/c.png"]
    (line,) = (line for line in said.err.splitlines() if "broken" in line)
    assert line.startswith("note: passed over: ")
    with Image.open("out/a.png") as a, Image.open("out/b.png") as b, Image.open("out/c.png") as c:
        assert [one.size for one in (a, b, c)] == [(30, 21)] * 3
        assert [one.mode for one in (a, b, c)] == ["RGB", "RGBA", "L"]
        small = Image.open("in/b.webp").getchannel("A").resize((30, 21), Image.Resampling.LANCZOS)
        assert np.array_equal(np.array(b.getchannel("A")), np.array(small))


def test_nothing_is_overwritten_and_without_a_model_it_is_lanczos(folder, capsys):
    for _ in range(2):
        assert command("in/a.png in/a.png -s 2 --device cpu".split()) == 0
    assert capsys.readouterr().out.split() == ["in/a-1.png", "in/a-2.png"]
    with Image.open("in/a.png") as small, Image.open("in/a-1.png") as large:
        assert small.size == (20, 14)
        assert np.array_equal(np.array(large), np.array(small.resize((40, 28), Image.Resampling.LANCZOS)))
    assert read_texts("in/a-1.png")["postprocessing"].endswith("Postprocess upscaler: Lanczos")


def test_an_out_without_a_suffix_is_a_folder_also_for_one_picture(folder, capsys):
    assert command("in/b.webp new --upscaler twice.pth --tile 32 --device cpu".split()) == 0
    assert capsys.readouterr().out == "new/b.png\n" and Image.open("new/b.png").size == (80, 56)


WRONG = {
    "": "give a picture and where the larger one goes",
    "in/a.png": "give a picture and where the larger one goes",
    "missing.png out.png": "picture='missing.png' is no file",
    "in/a.png out.jpg": "out='out.jpg': PNG is what is written",
    "in out.png": "out='out.png' must be a folder",
    "empty out": "picture='empty' holds no picture",
    "in/a.png out.png --scale 0.5": "scale=0.5 must lie between 1 and 16",
    "in/a.png out.png --scale nan": "scale",
    "in/a.png out.png --tile 8": "tile=8 must lie between 32 and 4096",
    "in/a.png out.png --upscaler missing.pth": "upscaler='missing.pth' is no file",
    "in/a.png out.png --upscaler in/a.png": "expected a .safetensors or .ckpt file",
    "in/a.png out.png --upscaler text.pth": "a text of 7 bytes, not weights",
    "in/a.png out.png --upscaler wrong.pth": "is no upscaler model that is known here",
    "text.pth out.png": "'text.pth' is no readable image",
    "in/a.png in/a.png/x.png": "cannot be written to",
    "in/a.png out.png more.png": "more.png",
    "in/a.png out.png --device tpu9": "device='tpu9'",
    "damaged out": "picture='damaged' holds no picture that can be read",
}


@pytest.mark.parametrize("given", WRONG)
def test_bad_input_ends_with_2_and_its_line(given, folder, capsys):
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "x.png").write_bytes(b"\x89PNG")
    (folder / "text.pth").write_text("no, no.")
    torch.save({"a": torch.ones(2)}, "wrong.pth")
    assert command([*given.split(), "--device=cpu"] if "--device" not in given else given.split()) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and WRONG[given] in lines[-1] and not (folder / "out.png").exists()
    assert len(lines) == 1 + given.startswith("damaged")


def test_it_runs_as_a_module(folder):
    done = forked("-m", "sd_hyena.upscale", *"in/a.png x.png --upscaler twice.pth --device cpu".split(), cwd=folder)
    assert done.returncode == 0 and done.stdout == "x.png\n" and done.stderr == ""
