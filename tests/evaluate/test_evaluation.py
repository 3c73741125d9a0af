"""An evaluation says what is true: nothing for the attention itself, more for a worse student, the same twice."""

import dataclasses
import json

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_hyena.distil.pieces import Pieces
from sd_hyena.errors import BadInput
from sd_hyena.evaluate.advice import advice
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.evaluation import evaluate
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.evaluate.pictures import TEACHING, Pictures
from sd_hyena.models import latents
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import Site, find_sites, select
from sd_hyena.students.checkpoint import StudentFile, load_students, save_students
from sd_hyena.students.student import StudentSpec, build_student
from tests.conftest import IN01

SMALL = dict(sizes="64,96x64", guidance="1,5", images=2, states=3, steps=1, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def states_of_small_pictures():
    """What errors are measured on is drawn at 64 px, not at the model's own 256."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pictures, "_to_learn_errors_on", lambda self, i: self._config(i, (64, 64), TEACHING))
        yield


def students(path, sites, operator, options, harm=0.0):
    """Students written to a file; windows as large as the grid are the attention itself."""
    torch.manual_seed(0)
    built = {}
    for site in sites:
        spec = StudentSpec(site.name, site.short, site.channels, operator, {"heads": site.heads, **options}, None)
        built[site.name] = build_student(spec)
        built[site.name].change_out.weight.data.normal_(std=harm) if harm else None
    save_students(path, StudentFile(built))
    return str(path)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    unet = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32).unet
    sites = select(find_sites(unet), "IN01,OUT11")
    same = students(folder / "same.safetensors", sites, "windows", {"window": 64})
    harmed = students(folder / "harmed.safetensors", sites, "windows", {"window": 64}, harm=0.1)
    given = EvaluationConfig(students=f"{same},{harmed}", out_dir=str(folder / "report"), **SMALL)
    return folder, given, evaluate(given)


def test_the_attention_itself_makes_no_error_anywhere(report):
    for found in report[2]["students"]["same"]["sizes"].values():
        assert all(row["relative_mse"] < 1e-9 for row in found["sites"].values())
        assert all(error < 1e-9 for error in found["prediction"].values())
        assert all(row["psnr_median"] > 60 and row["ssim_mean"] > 0.999 for row in found["images"].values())


def test_a_harmed_student_is_worse_in_every_measure_and_guidance_multiplies_it(report):
    for found in report[2]["students"]["harmed"]["sizes"].values():
        assert all(row["relative_mse"] > 1e-3 for row in found["sites"].values())
        assert all(error > 1e-5 for error in found["prediction"].values())
        assert all(row["psnr_median"] < 60 for row in found["images"].values())
        assert found["prediction"]["guided_1"] == pytest.approx(found["prediction"]["conditional"], rel=1e-4)


def test_the_error_by_timestep_adds_up_to_the_whole(report):
    row = report[2]["students"]["harmed"]["sizes"]["64x64"]["sites"]["IN01"]
    bins = [value for name, value in row.items() if name.startswith("t")]
    assert len(bins) == 3 and min(bins) <= row["relative_mse"] <= max(bins)  # three states, three of four bins


def test_everything_is_on_disk_and_in_tensorboard(report):
    folder = report[0] / "report"
    assert json.loads((folder / "report.json").read_text()) == report[2]
    text = (folder / "report.md").read_text()
    assert "## same" in text and "| 96x64 |" in text and str(folder) not in text
    with Image.open(folder / "same-96x64.png") as sheet:
        # two scales; at a size 1.5 times the first one picture of the two; teacher | student | difference
        assert sheet.size == (3 * 96, 2 * 64)
    events = EventAccumulator(str(folder)).Reload()
    assert {"same-64x64", "harmed-64x64", "same-errors"} <= set(events.Tags()["images"])


def without_times(content, label="harmed"):
    found = json.loads(json.dumps(content["students"][label]["sizes"]["64x64"]))
    for row in found["sites"].values():
        del row["attention_ms"], row["student_ms"]
    return found


@pytest.mark.gate
def test_the_same_evaluation_gives_the_same_numbers(report):
    """Also for one of two students at one of two sizes; all pictures are drawn anew."""
    folder, given, before = report
    one = dict(students=str(folder / "harmed.safetensors"), sizes="64", out_dir=str(folder / "again" / "report"))
    assert without_times(evaluate(dataclasses.replace(given, **one))) == without_times(before)


def test_sites_that_keep_their_attention_are_as_if_the_file_had_no_student_of_them(report, tmp_path):
    harmed = report[0] / "harmed.safetensors"
    students = load_students(harmed).students
    save_students(tmp_path / "less.safetensors", StudentFile({IN01: students[IN01]}))
    given = dict(SMALL, sizes="64", guidance="5", out_dir=str(tmp_path / "r"))
    given |= dict(students=f"{harmed},{tmp_path / 'less.safetensors'}")
    found = evaluate(EvaluationConfig(**given, keep_attention="OUT*"))
    kept, less = (without_times(found, label) for label in ("harmed without OUT*", "less"))
    assert kept == less and list(kept["sites"]) == ["IN01"]
    assert kept["prediction"] != without_times(report[2])["prediction"]
    with pytest.raises(BadInput, match=r"keep_attention='level0' leaves no student of .*harmed"):
        evaluate(EvaluationConfig(**given, keep_attention="level0"))


@pytest.mark.gate
def test_alternatives_meet_the_same_vae_whatever_was_measured_before(report, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "TILED_VAE_FROM", 80)  # the second size is above, the first below
    monkeypatch.setattr(Pieces, "_found", lambda _: {})  # the copy's pictures would be those that were kept
    same = report[0] / "same.safetensors"
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(same.read_bytes())
    given = dict(SMALL, guidance="1", students=f"{same},{copy}", out_dir=str(tmp_path / "r"))
    first, second = evaluate(EvaluationConfig(**given))["students"].values()
    for size in first["sizes"]:
        assert first["sizes"][size]["images"] == second["sizes"][size]["images"]


def test_what_is_measured_is_on_disk_before_the_next_size(report, tmp_path, monkeypatch):
    measure = Examiner.examine

    def stopped(self, students):
        sizes = measure(self, students)
        yield next(sizes)
        raise KeyboardInterrupt

    monkeypatch.setattr(Examiner, "examine", stopped)
    given = dict(SMALL, guidance="1", images=1, states=1, students=str(report[0] / "same.safetensors"))
    given |= dict(out_dir=str(tmp_path / "r"))
    with pytest.raises(KeyboardInterrupt):
        evaluate(EvaluationConfig(**given))
    assert list(json.loads((tmp_path / "r" / "report.json").read_text())["students"]["same"]["sizes"]) == ["64x64"]


@pytest.mark.gate
def test_a_one_dimensional_student_is_measured_at_its_own_size_alone(tmp_path):
    site = Site(IN01, "IN01", 32, 2, 0)
    spec = StudentSpec(site.name, site.short, 32, "bidirectional", {}, (8, 8))
    save_students(tmp_path / "s.safetensors", StudentFile({site.name: build_student(spec)}))
    given = dict(SMALL, students=str(tmp_path / "s.safetensors"), out_dir=str(tmp_path / "r"))
    assert list(evaluate(EvaluationConfig(**given))["students"]["s"]["sizes"]) == ["64x64"]
    with pytest.raises(BadInput, match="serve none of 96x64"):
        evaluate(EvaluationConfig(**given | {"sizes": "96x64"}))


def test_advice_names_the_sizes_at_which_attention_is_faster_or_the_prediction_suffers():
    def size(error, student_ms):
        return {"prediction": {"both": error}, "sites": {"IN01": {"attention_ms": 2.0, "student_ms": student_ms}}}

    lines = advice({"256x256": size(0.1, 3.0), "512x512": size(0.12, 1.0), "1024x1024": size(0.2, 1.0)})
    assert len(lines) == 2
    assert lines[0].startswith("256x256: attention is faster at IN01")
    assert lines[1].startswith("1024x1024: the prediction's error is 2.0 times")
    assert advice({"512x512": size(0.1, 1.0)}) == ["at no size measured is attention the better choice"]


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(sizes="256x"), "sizes"),
        (dict(sizes="100"), "multiples of 8"),
        (dict(guidance="1,x"), "guidance"),
        (dict(guidance="0.5"), "guidance"),
        (dict(sizes="99999999"), "sizes"),
        (dict(images=0), "images=0"),
    ],
)
def test_bad_input_is_named(options, said):
    with pytest.raises(BadInput, match=said):
        EvaluationConfig(**options)
