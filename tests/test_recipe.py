"""Stages in turn, each from the student before; the same command again goes on where it stopped."""

import json
import shutil

import pytest
import yaml

from sd_hyena.errors import BadInput
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.command import Terminated
from sd_hyena.recipe import command as recipe_command
from sd_hyena.recipe import read_recipe, run_recipe
from sd_hyena.students.checkpoint import load_students, save_students
from tests.conftest import IN01, ROOT, command
from tests.distil.test_training import assert_equal_weights, interrupt_after

SHARED = dict(width=64, batch_size=2, num_samples=4, sample_steps=2, seed=3, lr=1e-2, warmup_steps=0)
SHARED |= dict(save_every_n_steps=1, validate_every_n_steps=0, operator_options="reach=4")


def recipe(folder, *stages, **shared):
    path = folder / "recipe.yaml"
    shared = SHARED | {"out_dir": str(folder / "out"), "log_dir": str(folder / "logs")} | shared
    path.write_text(yaml.safe_dump_all([shared, *stages]))
    return str(path)


STAGES = [{"stage": "layerwise", "n_steps": 2}, {"stage": "joint", "n_steps": 1}, {"stage": "end_to_end", "n_steps": 1}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, drawn):
    """A folder in which all stages ran without a break, and the last student."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(drawn, folder / "out" / "cache")
    return folder, run_recipe(read_recipe([recipe(folder, *STAGES)]))


def test_every_stage_starts_from_the_student_before_and_the_last_one_is_the_result(whole):
    folder, last = whole
    assert len(list((folder / "out").glob("**/cache"))) == 1
    records = [json.loads(path.read_text()) for path in sorted((folder / "out").glob("*/done.json"))]
    assert [record["config"]["stage"] for record in records] == ["layerwise", "joint", "end_to_end"]
    assert [r["config"]["pretrained_weight"] for r in records] == ["", records[0]["student"], records[1]["student"]]
    assert str(last) == records[2]["student"]
    result = load_students(folder / "out" / "hyena.safetensors").students[IN01].state_dict()
    assert_equal_weights(result, load_students(last).students[IN01].state_dict())
    assert load_students(folder / "out" / "hyena.pt").training["config"]["stage"] == "end_to_end"


@pytest.mark.gate
def test_an_interrupted_recipe_goes_on_and_ends_as_the_uninterrupted_one(folder, whole, monkeypatch):
    expected = load_students(whole[1]).students[IN01].state_dict()

    import sd_hyena.distil.training as training

    path, original, seen = recipe(folder, *STAGES), training.train, []

    def fails_in_the_second(config, within):
        seen.append(config.stage)
        if config.stage == "joint" and seen.count("joint") == 1:
            raise OSError("power cut")
        return original(config, within)

    monkeypatch.setattr(training, "train", fails_in_the_second)
    with pytest.raises(OSError, match="power cut"):
        run_recipe(read_recipe([path]))
    last = run_recipe(read_recipe([path]))
    assert seen == ["layerwise", "joint", "joint", "end_to_end"]
    assert_equal_weights(load_students(last).students[IN01].state_dict(), expected)


def test_a_folder_of_another_recipe_is_refused(folder, capsys):
    run_recipe(read_recipe([recipe(folder, STAGES[0])]))
    said = capsys.readouterr().out
    assert said.count("next: ") == 1 and "--resume" not in said and "replacing" not in said
    run_recipe(read_recipe([recipe(folder, STAGES[0], keep=1)]))  # what is the machine's may change
    with pytest.raises(BadInput, match="another recipe"):
        run_recipe(read_recipe([recipe(folder, STAGES[0] | {"n_steps": 4})]))


@pytest.mark.parametrize(
    "documents, said",
    [
        ([{}], "has no stage"),
        ([{}, {"stage": "sideways"}], "stage"),
        ([{}, {"stage": "joint", "n_stepz": 3}], "n_stepz"),
        ([{"data": "noise"}, {"stage": "joint"}], "data=noise"),
    ],
)
def test_a_recipe_is_checked_whole_before_anything_is_loaded(tmp_path, documents, said, monkeypatch, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    monkeypatch.setattr("sd_hyena.distil.training.load_pipeline", lambda *_: pytest.fail("it was loaded"))
    assert recipe_command([str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_flags_win_over_the_file_and_what_a_recipe_decides_itself_is_refused(tmp_path):
    (stage,) = read_recipe([recipe(tmp_path, STAGES[0]), "-n", "7"])
    assert stage({}).n_steps == 7
    (tmp_path / "x.pt").touch()
    for flag in (f"-p{tmp_path}/x.pt", "--resume=auto"):
        with pytest.raises(BadInput, match="by itself"):
            read_recipe([recipe(tmp_path, STAGES[0]), flag])
    for wrong in ({"devices": 2}, {"target": "auto", "max_error": 0.1}):
        with pytest.raises(BadInput, match="names its sites and runs on one device"):
            read_recipe([recipe(tmp_path, STAGES[0] | wrong)])


def test_a_dry_run_tries_the_first_stage_and_tells_of_all(folder, capsys):
    few = [STAGES[0] | {"n_steps": 2}, STAGES[1] | {"n_steps": 1}]
    run_recipe(read_recipe([recipe(folder, *few), "--dry_run"]))
    said = capsys.readouterr().out
    assert "stage 1 of 2" in said and "stage 2 of 2" not in said and "all 2 stages from here on: about" in said
    assert "min for 2 steps" in said
    left = {path.suffix for path in (folder / "out").rglob("*") if path.name.startswith(("done", "hyena"))}
    assert left == set()


def test_the_result_has_the_name_that_was_asked_for_and_what_it_replaces_is_said(whole, tmp_path, capsys):
    shutil.copytree(whole[0] / "out", tmp_path / "out")
    capsys.readouterr()
    run_recipe(read_recipe([recipe(whole[0], *STAGES), "--name", "mine"]))  # all stages were done before
    said, out = capsys.readouterr().out, whole[0] / "out"
    assert said.count("done before") == 3 and "replacing" not in said and f"-y {out / 'mine.pt'}" in said
    mine, newest = (
        load_students(out / f"{name}.safetensors").students[IN01].state_dict() for name in ("mine", "hyena")
    )
    assert_equal_weights(mine, newest)
    assert (out / "mine.pt").is_file() and not list(out.glob("*-*/mine.*")) and not list(out.glob("*-*/hyena.*"))
    first = load_students(json.loads((out / "1-layerwise" / "done.json").read_text())["student"])
    save_students(out / "hyena.safetensors", first)
    run_recipe(read_recipe([recipe(whole[0], *STAGES)]))
    assert "hyena.safetensors and .pt, the students of another run" in capsys.readouterr().out


def test_a_stage_that_is_stopped_is_gone_on_with_by_the_same_command(folder, monkeypatch, capsys):
    path = recipe(folder, {"stage": "layerwise", "n_steps": 3})
    with monkeypatch.context() as patch, pytest.raises(Terminated):
        interrupt_after(patch, 2)
        run_recipe(read_recipe([path]))
    said = capsys.readouterr().out
    assert "saved at step 2; the same command goes on from there" in said and "--resume" not in said
    run_recipe(read_recipe([path]))
    assert "min for 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given", [["-h"], ["--help"], ["configs/recipes/tiny_sd_level0.yaml", "--help-all"], ["--help_all"]]
)
def test_help_names_the_recipes_that_ship_and_the_options_that_a_recipe_takes(given, capsys):
    assert recipe_command(given) == 0
    said = capsys.readouterr().out
    for path in (ROOT / "configs" / "recipes").glob("*.yaml"):
        assert f"configs/recipes/{path.name} " in said
    assert "FILE [options]" in said and "--n_steps" in said and "--dry_run" in said and "--name" in said
    assert not any(f"--{name} " in said for name in ("resume", "pretrained_weight", "devices"))
    assert ("--warmup_steps" in said) == ("all" in given[-1])


def test_train_says_how_a_recipe_is_run():
    path = ROOT / "configs" / "recipes" / "tiny_sd_level0.yaml"
    done = command("train.py", "--config", path)
    assert done.returncode == 2 and "python -m sd_hyena.recipe" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_that_ships_is_valid_and_says_how_to_run_it(path):
    assert len(read_recipe([str(path)])) == len(read_documents(str(path))) - 1
    assert f"python -m sd_hyena.recipe {path.relative_to(ROOT)}" in path.read_text()
