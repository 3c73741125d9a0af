"""Names beside the model: what stands in its students/, vae/, loras/, embeddings/ and upscalers/ needs no path."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.generate.generation import generate
from sd_hyena.options.command_line import parse, to_dict, with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01, OUT11, command


def students(path: Path, site: str, short: str, seed: int) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = build_student(StudentSpec(site, short, 32, "pointwise", {}, None))
        for parameter in student.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_students(path, StudentFile({site: student}))
    return str(path)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A link to the shipped model with files beside it; the working folder is an empty one."""
    root = tmp_path / "models"
    students(root / "students" / "first.safetensors", IN01, "IN01", 1)
    students(root / "students" / "last.pt", OUT11, "OUT11", 2)
    (root / "loras").mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, root / "loras" / "soft.safetensors")
    (root / "embeddings").mkdir()
    torch.save(torch.zeros(1, 96), root / "embeddings" / "word.pt")
    (root / "vae").mkdir()
    (root / "vae" / "sharp").symlink_to(SHIPPED_MODEL / "vae")
    (root / "upscalers").mkdir()
    torch.save({"body.0.weight": torch.zeros(1)}, root / "upscalers" / "twice.pth")
    (root / "tiny").symlink_to(SHIPPED_MODEL)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return root / "tiny"


GIVEN = {  # option -> a value with names, and what they stand for beside the model
    "hyena": ("first + last,last.pt", "{students}/first.safetensors+{students}/last.pt,{students}/last.pt"),
    "lora": ("soft:0.5,soft.safetensors", "{loras}/soft.safetensors:0.5,{loras}/soft.safetensors"),
    "embeddings": ("word", "{embeddings}/word.pt"),
    "vae": ("sharp", "{vae}/sharp"),
    "upscaler": ("twice", "{upscalers}/twice.pth"),
}


@pytest.mark.parametrize("option", GIVEN)
def test_a_name_stands_for_its_file_beside_the_model_and_is_recorded_as_a_name(model, option):
    folders = {kind: model.parent / kind for kind in ("students", "loras", "embeddings", "vae", "upscalers")}
    value, expected = GIVEN[option]
    config = parse(GenerateConfig, ["-m", str(model), f"--{option}", value])
    assert getattr(config, option).replace(" ", "") == expected.format(**folders)
    recorded = to_dict(config)[option]
    assert "/" not in recorded and with_paths(GenerateConfig(**{"model": str(model), option: recorded})) == config


def test_the_upscaler_that_a_picture_of_a1111_names_is_taken_from_there_if_it_is_there(model, tmp_path, capsys):
    text = (
        "a fox\nSteps: 5, Seed: 1, Size: 64x64, RNG: CPU, Hires upscale: 2, Denoising strength: 0.4, Hires upscaler: "
    )
    for name, found in (("Twice", f"{model.parent}/upscalers/twice.pth"), ("4x-UltraSharp", ""), ("Lanczos", "")):
        chunk = PngInfo()
        chunk.add_text("parameters", text + name)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=chunk)
        config = parse(GenerateConfig, ["-m", str(model), "--from", str(tmp_path / "x.png")])
        assert (config.hires, config.upscaler) == (2.0, found)
        assert ("Hires upscaler '4x-UltraSharp'; give --upscaler" in capsys.readouterr().out) == ("4x" in name)
    own = parse(GenerateConfig, ["-m", str(model), "--from", str(tmp_path / "x.png"), "--upscaler", "twice"])
    assert own.upscaler.endswith("twice.pth")


def test_training_and_evaluation_know_the_names_too(model):
    expected = str(model.parent / "students" / "first.safetensors")
    assert parse(TrainConfig, ["-m", str(model), "-p", "first"]).pretrained_weight == expected
    assert parse(EvaluationConfig, ["-m", str(model), "--students", "first"]).students == expected


def test_a_path_that_exists_wins_over_a_name(model):
    here = students(Path("first"), IN01, "IN01", 3)
    assert parse(GenerateConfig, ["-m", str(model), "-y", "first+last"]).hyena.startswith(f"{here}+/")


def test_students_that_need_no_file_are_not_looked_for(model):
    given = ["-m", str(model), "-y", "landmarks:64+last,landmarks"]
    assert parse(GenerateConfig, given).hyena == f"landmarks:64+{model.parent}/students/last.pt,landmarks"


def test_a_single_file_has_its_names_in_its_own_folder_and_the_shipped_model_in_its(model, monkeypatch):
    file = model.parent / "single.safetensors"
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, file)
    assert parse(GenerateConfig, ["-m", str(file), "-y", "last"]).hyena == str(model.parent / "students" / "last.pt")
    monkeypatch.setattr("sd_hyena.options.given_path.SHIPPED_MODEL", model)
    assert parse(GenerateConfig, ["-y", "last"]).hyena == str(model.parent / "students" / "last.pt")


def test_an_unknown_name_is_answered_with_those_there_are_before_torch_is_loaded(model):
    code = "import sys, runpy\nsys.argv = ['x', '-m', sys.argv[1], '-y', 'first+frist']\n"
    code += "try: runpy.run_module('generate', run_name='__main__')\n"
    code += "except SystemExit as end: assert end.code == 2 and 'torch' not in sys.modules"
    done = command("-c", code, model)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "error: hyena='frist' is no file; of that kind there are beside the model: first, last\n"
    for option, value in (("vae", "blurred"), ("lora", "soft:1,hard:0.5"), ("embeddings", "word,verb")):
        with pytest.raises(BadInput, match=rf"{option}='\w+' is no file; .*: (sharp|soft|word)$"):
            with_paths(GenerateConfig(**{"model": str(model), option: value}))


def test_a_picture_drawn_by_a_name_is_the_one_of_its_file_and_repeats_elsewhere(model, tmp_path):
    small = dict(model=str(model), width=64, steps=2, num_images=1, cfg_scale=3.0, seed=11, device="cpu")
    path = model.parent / "students" / "first.safetensors"
    (by_path,) = generate(GenerateConfig(**small, hyena=str(path), out_dir=str(tmp_path / "a")))
    (by_name,) = generate(GenerateConfig(**small, hyena="first", out_dir=str(tmp_path / "b")))
    (without,) = generate(GenerateConfig(**small, out_dir=str(tmp_path / "c")))
    pictures = [np.array(Image.open(picture)) for picture in (by_path, by_name, without)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[1], pictures[2])
    other = tmp_path / "elsewhere" / "model"
    other.parent.mkdir()
    other.symlink_to(SHIPPED_MODEL)
    own = students(other.parent / "students" / "first.safetensors", IN01, "IN01", 4)
    assert parse(GenerateConfig, ["--from", str(by_name), "-m", str(other)]).hyena == own
