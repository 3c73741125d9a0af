"""Studies measure each row once, and say what stands in it."""

import shlex
from pathlib import Path

import torch

from benchmarks.harness import methods
from benchmarks.report import plots, tables
from benchmarks.studies import quality, sharp_training, sharpness, students
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.options.command_line import parse
from sd_hyena.sites import Site
from sd_hyena.students.student import Projections


def test_a_row_of_students_is_measured_once_and_a_teacher_asked_once_for_a_case(tmp_path, monkeypatch):
    asked, examined = [], []

    class Examiner:
        def __init__(self, config, engine):
            asked.append((config.sizes, config.scales()))
            self.config, self.pipe = config, self
            self.unet, self.sizes = None, config.parsed_sizes()

        def examine(self, given):
            examined.append(given)
            image = dict(
                images=2, psnr_median=31.25, psnr_mean=32.0, psnr_min=20.0, ssim_mean=0.9876, share_above_20_dB=1
            )
            image |= dict(teacher_right=0.5, student_right=1.0)
            scale = f"{self.config.scales()[0]:g}"
            yield None, {"images": {scale: image}, "prediction": {"both": 1.234e-4, f"guided_{scale}": 0.0}}, []

    class Alternative:
        students = "given"

    monkeypatch.setattr(students, "Examiner", Examiner)
    monkeypatch.setattr(students, "alternatives_of", lambda config, examiner: [Alternative])
    students.main("all 256x256 *", out=str(tmp_path))
    assert len(examined) == len(asked) == 3  # guidance 5, 10, 1, of which none shares its teacher's pictures
    students.main("* 256x256 5", out=str(tmp_path))
    assert len(examined) == 3 + len(students.STUDENTS) - 1 and len(asked) == 4
    students.main("all 256x256 *", out=str(tmp_path))
    assert len(asked) == 4
    students.main("all 256x256 5", again=True, out=str(tmp_path))
    rows = plots.read(tmp_path / "students.csv")
    assert len(asked) == 5 and len(rows) == len(students.STUDENTS) + 2
    assert [row["size"] + " " + row["guidance"] for row in rows] == ["256x256 5"] * 6 + ["256x256 10", "256x256 1"]
    cells = tables.students(rows).splitlines()[2].split(" | ")
    assert tables.headline(rows).count("| .00012 | 0 | **31.2 dB** | .988 | 100 % |") == len(students.STUDENTS)
    assert cells[1:] == ["256 x 256, 5", "2", ".00012", "0", "31.2, 32.0, 20.0", ".988", "100 %", "1, 2 |"]


def test_students_are_taught_the_attention_that_was_sharpened_and_others_judge_them():
    site, source = Site("s", "IN01", channels=32, heads=2, level=0), torch.Generator().manual_seed(0)
    own = Projections(
        *(torch.nn.Linear(32, 32, bias=False) for _ in range(3)), torch.nn.ModuleList([torch.nn.Identity()])
    )
    with torch.no_grad():
        for projection in own[:3]:
            projection.weight.copy_(0.2 * torch.randn(32, 32, generator=source))
    found = [(site, torch.randn(1, 49, 32, generator=source), own, (7, 7)) for _ in range(8)]
    soft, sharp = (sharp_training.lessons_of(found, factor) for factor in (1, 2))
    assert not torch.allclose(soft[0][3], sharp[0][3], atol=0.05)
    student = sharp_training.built(site, "clusters", {"learned": True}, landmarks=16)
    own[3].append(torch.nn.Identity())  # diffusers' to_out has a dropout behind the layer
    learned, held_out = sharp[:6], sharp[6:]
    before = [sharp_training.judged(student, some) for some in (learned, held_out)]
    sharp_training.taught(student, learned, 60, 4, 1e-2, 1e-3)
    after = [sharp_training.judged(student, some) for some in (learned, held_out)]
    assert after[0] < 0.9 * before[0] and after[1] < 0.95 * before[1]


def test_the_command_of_a_row_asks_for_what_was_measured():
    for case, files in students.CASES.items():
        for file in files:
            line = students.command_of(case, file)
            _, _, _, given, *flags = shlex.split(line)
            config = parse(EvaluationConfig, ["--students", given, *flags])
            assert (config.sizes, config.images, config.states) == (case.size, case.images, case.states)
            kept = f"{students.KEEP}{config.keep_attention}" if config.keep_attention else ""
            assert Path(config.students).stem + kept == file
            assert config.scales() == [case.guidance]


def test_a_row_of_operators_is_made_once_whether_the_table_or_the_folder_has_it(tmp_path, monkeypatch, capsys):
    made, written = [], []

    def run_row(row, config, folder, examiner):
        made.append((row.name, config.seed))
        image = dict(psnr_median=30, psnr_mean=30, ssim_mean=0.9, share_above_20_dB=1)
        errors = dict(both=0.001, as_noise=0.001, guided_5=0.001)
        facts = dict(name=row.name, seed=config.seed, steps=7, commit="c", date="d", gflop_2048=1e9)
        return facts | dict(sites={"IN01": dict(relative_mse=0.000123)}, prediction=errors, images={"5": image})

    monkeypatch.setattr(quality, "run_row", run_row)
    monkeypatch.setattr(quality, "Examiner", lambda config: None)
    monkeypatch.setattr(quality, "RESULTS", tmp_path)
    monkeypatch.setattr(quality, "write", lambda name, rows, **_: written.append(rows))
    before = ["student,seed,steps,prediction", "pointwise MLP,0,7,.5", "windows,0,7,.25"]
    (tmp_path / "quality.csv").write_text("\n".join(before))
    given = dict(n_steps=7, out=str(tmp_path / "rows"), only="pointwise")
    quality.main(**given)
    assert not made and "1 rows are in the table and stay" in capsys.readouterr().out
    quality.main(**given, seeds=2)
    quality.main(**given, seeds=2)
    assert made == [("pointwise MLP", 1)]
    quality.main(**given, again=True)
    assert made == [("pointwise MLP", 1), ("pointwise MLP", 0)]
    rows = written[-1]
    assert [(row["student"], int(row["seed"])) for row in rows] == [
        ("pointwise MLP", 0),
        ("pointwise MLP", 1),
        ("windows", 0),
    ]
    assert rows[0]["IN01"] == 0.00012 and rows[0]["gflop_2048"] == quality.operations("pointwise MLP") < 1e6


def test_several_seeds_of_a_row_are_told_by_their_median_and_range_and_untrained_ones_by_their_stress():
    common = dict(steps="200", as_noise="0.1", guided_5="0.1", psnr_mean="30", ssim="0.9", gflop_2048="7")
    rows = [
        dict(student="one", seed=str(n), prediction=p, psnr_median=db, **common)
        for n, (p, db) in enumerate([("0.003", "31"), ("0.001", "30"), ("0.002", "35.04")])
    ]
    rows += [dict(student="CLEAR, radius 8, untrained", seed="0", prediction="0.0015", psnr_median="30", **common)]
    first, second = tables.quality(rows).splitlines()[2:]
    sharper = {row["untrained"]: row for row in plots.read(tables.RESULTS / "sharpness.csv")}["CLEAR, radius 8"]
    assert f" | {sharper['IN01_x2'].removeprefix('0')} | " in first and "| 1 | .0015 |" in first
    assert "| one | 200 | 3 | .002 (.001 to .003) | .1 (.1 to .1) |" in second and "31.0 (30.0 to 35.0)" in second


def test_every_untrained_row_of_operators_names_its_row_of_sharper_attention():
    names = [row["untrained"] for row in plots.read(tables.RESULTS / "sharpness.csv")]
    for name, made in methods.UNTRAINED.items():
        bare = name.removesuffix(tables.UNTRAINED)
        row = tables.STRESSED.get(bare, bare)
        assert row in names and sharpness.METHODS[row] == made
