"""Names are data: what is there under the whole string is one file."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.generate.alternatives import load_alternatives
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.checkpoint import StudentFile, save_students
from sd_hyena.students.student import StudentSpec, build_student
from sd_hyena.text.textual_inversion import read_embeddings
from tests.conftest import IN01, OUT11

NAMES = ["a,b", "a+b", "a:0.5", "1,2,3", "a, b", "a+b,c+d", " a ", "[a]", "a;b", "a=b", "100%", "é", "-a", "x:1"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_one_file_of_any_name_is_one_file_wherever_lists_are_taken(here, name):
    student, lora, picture, word = f"{name}.pt", f"{name}.safetensors", f"{name}.png", f"{name}.bin"
    for file in (student, picture, word):
        (here / file).touch()
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1)}, lora)
    assert given_path.students(student, "hyena") == [here.joinpath(student).relative_to(here)]
    assert given_path.alternatives(student) == [[student]]
    assert [(str(path), weight) for path, weight in given_path.loras(lora)] == [(lora, 1.0)]
    assert [(str(path), weight) for path, weight in given_path.loras(f"{lora}:0.7")] == [(lora, 0.7)]
    assert [str(path) for path in given_path.pictures(picture, "control_image")] == [picture]
    assert [(str(path), asked) for path, asked in given_path.embeddings(word)] == [(word, True)]


def test_in_a_list_the_longest_names_that_are_there_are_taken(here):
    for name in ("a", "a,b", "b", "a+b", "c,d+e", "d", "a,b:1"):
        (here / name).touch()
    assert given_path.several("a,b,b,a") == ["a,b", "b", "a"]
    assert given_path.several("x,a,b,y") == ["x", "a,b", "y"]
    assert given_path.several("b, a,b ,d") == ["b", "a,b", "d"]
    assert given_path.alternatives("a+b+d,c,d+e+a,b") == [["a+b", "d"], ["c,d+e", "a,b"]]
    assert given_path.alternatives("d+b,d") == [["d", "b"], ["d"]]
    assert given_path.several(" , ,") == [] and given_path.alternatives("+,") == []


def test_a_name_that_is_no_file_is_refused_in_the_part_that_is_missing(here):
    (here / "a.pt").touch()
    with pytest.raises(BadInput, match=r"hyena='b\+\.pt' is no file|hyena='b' is no file"):
        given_path.students("a.pt,b", "hyena")


def test_folders_of_embeddings_and_controlnets_may_have_such_names_too(here):
    (here / "words, mine").mkdir()
    save_file({"emb_params": torch.ones(1, 96)}, "words, mine/x.safetensors")
    assert [one.word for one in read_embeddings("words, mine")] == ["x"]
    for name in ("a,b", "c"):
        (here / name).mkdir()
        (here / name / "config.json").write_text('{"_class_name": "ControlNetModel"}')
        Image.new("RGB", (8, 8)).save(f"{name}.png")
    config = GenerateConfig(controlnet="a,b,c", control_image="a,b.png,c.png", control_scale="1,0.5")
    assert config.controls == [("a,b", 1.0), ("c", 0.5)]


def test_students_in_files_of_such_names_are_loaded_and_told_apart(here, unet):
    for name, site, short in (("a+b.pt", IN01, "IN01"), ("c,d.pt", OUT11, "OUT11")):
        save_students(name, StudentFile({site: build_student(StudentSpec(site, short, 32, "pointwise", {}, None))}))
    together, alone = load_alternatives("a+b.pt+c,d.pt,a+b.pt", unet)
    assert list(together.students) == [IN01, OUT11] and list(alone.students) == [IN01]
    assert together.label == "IN01:a+b, OUT11:c,d"
    (again,) = load_alternatives(together.entry, unet)  # as a picture records it
    assert again.files == together.files
