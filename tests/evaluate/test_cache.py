"""An evaluation that is ended costs one picture: the same again draws the rest and says the very same."""

import copy
import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.evaluate import cache as caching
from sd_hyena.evaluate import errors
from sd_hyena.evaluate.cache import Cache
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.evaluation import evaluate
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.evaluate.pictures import TEACHING, Pictures
from sd_hyena.evaluate.report import Report
from sd_hyena.generate.alternatives import load_alternatives
from sd_hyena.generate.engine import Engine, Model
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import find_sites, select
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01
from tests.evaluate.test_evaluation import students

SMALL = dict(sizes="64", guidance="1", images=2, states=1, steps=2, device="cpu")
PICTURES = 5  # one whose states errors are measured on, two of the teacher, two of the student


@pytest.fixture
def drawn(monkeypatch):
    """What the engine is asked to draw, at 64 px; number `ends_at` is interrupted. No blocks are timed, no plots made."""
    monkeypatch.setattr(errors, "block_seconds", lambda *_, **__: (0.002, 0.001))
    monkeypatch.setattr(Pictures, "_to_learn_errors_on", lambda self, i: self._config(i, (64, 64), TEACHING))
    monkeypatch.setattr(Report, "finish", lambda self: None)
    asked, draw = SimpleNamespace(seeds=[], ends_at=0), Engine.draw

    def counted(self, config, *rest):
        asked.seeds.append(config.seed)
        if len(asked.seeds) == asked.ends_at:
            raise KeyboardInterrupt
        return draw(self, config, *rest)

    monkeypatch.setattr(Engine, "draw", counted)
    return asked


def test_an_evaluation_that_is_ended_draws_only_the_rest_and_says_the_very_same(tmp_path, shared_pipe, drawn, capsys):
    sites = select(find_sites(shared_pipe.unet), "IN01")
    for name, harm in (("a", 0.1), ("b", 0.2)):
        students(tmp_path / f"{name}.safetensors", sites, "windows", {"window": 64}, harm)
    config = lambda name, out: EvaluationConfig(
        students=str(tmp_path / f"{name}.safetensors"), out_dir=str(tmp_path / out / "report"), **SMALL
    )
    whole = evaluate(config("a", "at_once"))
    assert len(drawn.seeds) == PICTURES and "from a run before" not in capsys.readouterr().out

    drawn.seeds, drawn.ends_at = [], 3
    with pytest.raises(KeyboardInterrupt):
        evaluate(config("a", "ended"))
    assert f"2 of {PICTURES} pictures are kept; the same command goes on from there" in capsys.readouterr().out
    damaged = sorted((tmp_path / "ended" / "cache").glob("latents-*/*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1  # the last bit of a mantissa
    damaged.write_bytes(content)

    drawn.seeds, drawn.ends_at = [], 0
    again = evaluate(config("a", "ended"))
    assert len(drawn.seeds) == PICTURES - 2 + 1 and again == whole
    said = capsys.readouterr().out
    assert f"2 of {PICTURES} pictures are kept from a run before" in said and said.count("is damaged") == 1
    kept = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("at_once", "ended")
    ]
    assert kept[0] == kept[1] and len(kept[0]) == PICTURES

    examiner = Examiner(config("b", "ended"), kept_in=tmp_path / "ended" / "cache")
    (other,) = load_alternatives(examiner.config.students, shared_pipe.unet)
    wanted = examiner.kept([other.students])
    assert len(wanted) == PICTURES and sum(file.exists() for file in wanted) == PICTURES - 2  # the teacher's


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A copy of the shipped model's folder, of whose UNet nothing is loaded."""
    folder = tmp_path_factory.mktemp("kept") / "model"
    shutil.copytree(SHIPPED_MODEL, folder, ignore=shutil.ignore_patterns("students"))
    return loaded(folder)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return Model(SimpleNamespace(unet=nn.Linear(1, 1, dtype=dtype)), folder, "", None)


def file_of(model: Model, students: dict | None = None, /, **options) -> Path:
    """Where a picture is kept."""
    config = GenerateConfig(**dict(prompt="a red circle", width=64, steps=2, cfg_scale=3.0, seed=1) | options)
    return Cache(Path("cache"), model).of("teacher", [config], lambda piece: None, students).files[0]


def test_a_picture_is_found_by_all_that_it_depends_on(model, tmp_path, monkeypatch):
    files = [file_of(model)]
    drawn_otherwise = dict(prompt="a blue square", seed=2, width=72, height=72, steps=3, cfg_scale=4.0)
    drawn_otherwise |= dict(scheduler="euler", negative_prompt="grey", clip_skip=2, tiled_vae="fast", hypertile=32)
    files += [file_of(model, **{name: value}) for name, value in drawn_otherwise.items()]
    files.append(file_of(loaded(model.path, torch.bfloat16)))
    for changed in ("unet/config.json", "text_encoder/model*", "tokenizer/tokenizer.json", "scheduler/*", "vae/diff*"):
        other = tmp_path / changed.split("/")[0]
        shutil.copytree(model.path, other)
        file = next(other.glob(changed))
        file.write_bytes(file.read_bytes() + b" ")
        files.append(file_of(loaded(other)))
    with monkeypatch.context() as patch:
        patch.setattr(caching, "versions", lambda: {"sd_hyena": "another"})
        files.append(file_of(model))
    assert len(set(files)) == len(files)
    assert file_of(model) == files[0] == file_of(model, model="", device="cpu")
    (tmp_path / "renamed").symlink_to(model.path)
    (model.path / "card.md").write_text("what no picture depends on")
    assert file_of(loaded(tmp_path / "renamed")) == files[0]


class OneOfOurOwn(nn.Module):
    pass


def test_students_are_known_by_their_numbers_and_by_what_they_are(model, monkeypatch):
    spec = StudentSpec(IN01, "IN01", 32, "windows", {"heads": 2, "window": 8}, None)
    torch.manual_seed(0)
    student = build_student(spec)
    nearly, other = copy.deepcopy(student), dataclasses.replace(spec, options={"heads": 2, "window": 4})
    with torch.no_grad():
        nearly.change_out.weight[3, 5] += 1e-6
    as_other = build_student(other)
    as_other.load_state_dict(student.state_dict())
    sets = [None, {IN01: student}, {IN01: nearly}, {IN01: as_other}, {IN01: student, "elsewhere": student}]
    files = [file_of(model, students) for students in sets]
    assert len(set(files)) == len(files) and file_of(model, {IN01: copy.deepcopy(student)}) == files[1]
    code = caching._code_of({IN01: student, "own": OneOfOurOwn()})
    assert Path(__file__) in code and {"window_attention.py", "clusters.py", "student.py"} <= {
        file.name for file in code
    }
    monkeypatch.setattr(caching, "_code_of", lambda _: [Path(__file__)])  # somebody works on an operator
    assert file_of(model, sets[1]) != files[1] and file_of(model) == files[0]


def test_whoever_asks_for_no_folder_has_everything_drawn(model):
    """As studies do that change the model after it was loaded."""
    pipe = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=8)), vae_scale_factor=8)
    engine = SimpleNamespace(load=lambda config: dataclasses.replace(model, pipe=pipe))
    pictures = Pictures(EvaluationConfig(**SMALL), ["a red circle"] * 2, engine)
    assert pictures.kept((64, 64), 1.0) is pictures.kept_latents([0]) is None


def test_a_folder_that_cannot_hold_pictures_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cache_dir="):
        evaluate(EvaluationConfig(students="all", cache_dir=str(tmp_path / "file"), out_dir=str(tmp_path / "report")))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
