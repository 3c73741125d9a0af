"""A command line for other machines, and names of files that hold what parts lists."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.options import given_path
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.named_files import find
from sd_hyena.options.typed import portable_command


@pytest.mark.parametrize(
    "typed, portable",
    [
        ("/x/sd_hyena/evaluate/__main__.py out/a.pt -s 3", "python -m sd_hyena.evaluate out/a.pt -s 3"),
        ("/x/bin/sd-hyena evaluate /home/me/a.pt,/home/me/b.pt+c.pt", "sd-hyena evaluate a.pt,b.pt+c.pt"),
        ("/x/sd_hyena/__main__.py evaluate a.pt --out_dir=/mnt/r", "python -m sd_hyena evaluate a.pt --out_dir=r"),
        ("/x/sd_hyena/sd_hyena/demo.py -o C:\\Users\\me\\out", "python -m sd_hyena.demo -o out"),
        ("/x/generate.py -m {here}/models/sd.safetensors", "python generate.py -m models/sd.safetensors"),
        ("/x/generate.py -m {here}/models/a,/b.safetensors", "python generate.py -m models/a,/b.safetensors"),
        ("/x/generate.py --lora {here}/l.safetensors:0.8 -p 1/2", "python generate.py --lora l.safetensors:0.8 -p 1/2"),
    ],
)
def test_a_quoted_command_has_no_folder_of_this_machine(typed, portable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "models" / "a," / "b.safetensors"
    odd.parent.mkdir(parents=True)
    odd.touch()
    said = portable_command(typed.format(here=tmp_path).split())
    assert said == portable and str(tmp_path) not in said


def test_a_blank_in_an_argument_is_quoted():
    assert portable_command(["/x/generate.py", "-p", "a cat"]) == "python generate.py -p 'a cat'"


ODD = "a+b, c:1"  # as a name of a file or folder


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """A folder with such names, to be in."""
    monkeypatch.chdir(tmp_path)
    Path(ODD).mkdir()
    save_file({"unet.x.lora_down.weight": torch.ones(1, 1)}, f"{ODD}/x, y+z.safetensors")
    for name in (f"{ODD}.pt", f"{ODD}.png", "c.pt"):
        Path(name).touch()
    return tmp_path


def test_what_is_a_file_as_a_whole_is_one_wherever_lists_are_taken(odd):
    lora = f"{ODD}/x, y+z.safetensors"
    assert given_path.alternatives(f"{ODD}.pt") == [[f"{ODD}.pt"]]
    assert given_path.alternatives(f"c.pt+{ODD}.pt,c.pt") == [["c.pt", f"{ODD}.pt"], ["c.pt"]]
    assert given_path.loras(f"{lora}:0.5,{lora}") == [(Path(lora), 0.5), (Path(lora), 1.0)]
    assert [path for path, _ in given_path.embeddings(f"{ODD}.pt,{ODD}")] == [Path(f"{ODD}.pt"), Path(lora)]
    assert given_path.pictures(f"{ODD}.png,{ODD}.png", "x") == [Path(f"{ODD}.png")] * 2
    assert given_path.folders(f"{ODD},.", "x") == [Path(ODD), Path(".")]
    assert find("lora", "x, y+z", "", f"{ODD}, .") == Path(lora)


def test_a_lora_that_a_prompt_names_may_have_a_comma_in_its_name(odd):
    config = parse(GenerateConfig, ["-p", "a fox <lora:x, y+z:0.5>", "--lora_dir", ODD])
    assert config.prompt == "a fox" and given_path.loras(config.lora) == [(Path(f"{ODD}/x, y+z.safetensors"), 0.5)]
