"""What happens between the tabs of the page, in process: its components' events are called as gradio calls them."""

import dataclasses
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import write_image
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.recipe import read_recipe
from sd_hyena.ui.folders import SHIPPED
from sd_hyena.ui.leftovers import tidy
from sd_hyena.ui.page_config import PageConfig
from sd_hyena.ui.trainings import Trainings

REGION = dict(x=0.0, y=0.0, w=0.5, h=0.5, prompt="a circle")
A1111 = "a blue square\nNegative prompt: green\nSteps: 7, Sampler: Euler, CFG scale: 3.5, Seed: 77, Size: 96x64, Version: v1.10.1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A page that nobody serves."""
    pytest.importorskip("gradio", reason="no gradio; pip install -r requirements-ui.txt")
    from sd_hyena.ui.server import Page
    from sd_hyena.ui.session import Session

    folder = tmp_path_factory.mktemp("whole")
    (folder / "loras").mkdir()
    save_file({}, folder / "loras" / "gold.safetensors")
    places = {f"{name}_dir": str(folder / name) for name in ("out", "train", "log")}
    return Page(Session(PageConfig(lora_dir=str(folder / "loras"), device="cpu", **places)))


@pytest.fixture
def given(whole):
    """The values of a page that nobody has touched."""
    whole.session.album._pictures.clear()
    every = [*whole.settings, *whole.compare.settings, *whole.distil.settings]
    return {one: one.value for one in every} | {whole.opened: "yes", whole.form.components["device"]: "cpu"}


def with_options(whole, given, regions="[]", painter="", **options):
    parts = whole.form.components
    texts = {name: str(value) if name in ("steps", "width", "cfg_scale") else value for name, value in options.items()}
    return given | {parts[name]: value for name, value in texts.items()} | {
        whole.regions.editor: regions, whole.redraw.painter: painter,
    }  # fmt: skip


def test_no_event_has_two_listeners_that_gradio_would_put_off(whole):
    """It answers one that was put off by repeating the event, with all its listeners: two would call each other for ever."""
    put_off = Counter(
        target
        for listener in whole.blocks.fns.values()
        for target in listener.targets
        if listener.trigger_mode == "always_last" and target[0] is not None
    )
    assert put_off and {target for target, count in put_off.items() if count > 1} == set()


def applied(given, updates):
    """The values of a page once a handler has answered."""
    found = dict(given)
    for component, update in updates.items():
        if isinstance(update, dict):
            found |= {component: update["value"]} if "value" in update else {}
        elif component in found and "value" in getattr(update, "_constructor_args", [{}])[0]:
            found[component] = update.value
        elif isinstance(update, str):
            found[component] = update
    return found


def picture(whole, name="image_000.png", texts=None, **options):
    """One of the album, as the engine would have written it, or another program."""
    from sd_hyena.ui.job import Picture

    path = Path(whole.session.config.out_dir) / name
    config = GenerateConfig(device="cpu", out_dir=whole.session.config.out_dir, **options)
    image = Image.new("RGB", (config.width or 64, config.height or 64), "navy")
    if texts:
        chunks = PngInfo()
        chunks.add_text("parameters", texts)
        image.save(path, pnginfo=chunks)
    else:
        path = write_image(path, image, "", {"config": to_dict(config)})
    whole.session.album.add(found := Picture(path.absolute(), config, 2.0))
    return found


def dirty(whole, given, tmp_path):
    """A page on which nearly every kind of option stands at something."""
    save = whole.session.uploads / "old.png"
    Image.new("RGB", (64, 64)).save(save)
    options = dict(
        scheduler="euler", circular=True, lora=["gold.safetensors:0.5"], hyena=["landmarks:64:IN01"], steps=9
    )
    options |= dict(hires=2.0, clip_skip=2, tiled_vae="fast", init_image=str(save), prompt="old", hypertile=256)
    return with_options(whole, given, json.dumps([REGION]), **options)


def test_a_preset_restores_all_that_was_there_when_it_was_saved_whatever_the_page_shows(whole, given, tmp_path):
    plain = with_options(whole, given, width=64, prompt="a circle", hyena=["level0"])
    parts, old = whole.form.components, dirty(whole, given, tmp_path)
    for name, saved in {"plain": plain, "much": old | {parts["karras"]: True}}.items():
        said = whole.save_preset(saved | {whole.draw.preset_name: name})
        assert f"saved as {name}.yaml" in said[whole.draw.notice]
        for before in (old, given):
            updates = whole.load_preset(name)
            assert whole.order(applied(before, updates)) == whole.order(saved)
            assert "not taken" not in updates[whole.draw.notice]
    (whole.session.uploads / "old.png").unlink()
    updates = whole.load_preset("much")
    assert updates[parts["init_image"]]["value"] is None and "old.png&#x27; is no upload" in updates[whole.draw.notice]
    again = whole.load_preset("sd15_upscale_4x")  # says how to start from a picture, and names none: that stays
    assert parts["init_image"] not in again and again[parts["strength"]]["value"] == 0.4


def test_faults_of_presets_are_said_beside_them(whole, given, tmp_path):
    for name in ("", "../up"):
        said = whole.save_preset(given | {whole.draw.preset_name: name})
        assert "must be a name" in said[whole.draw.notice] and "preset-name" in said[whole.faults]
    folder = whole.session.presets_folder
    folder.mkdir(exist_ok=True)
    for text, why in {
        "stepz: 3": "stepz",
        "steps: [3]": "steps",
        "width: 64\n---\nwidth: 72": "several documents",
    }.items():
        (folder / "odd.yaml").write_text(text)
        said = whole.load_preset("odd")
        assert why in said[whole.draw.notice] and said.keys() == {whole.draw.notice}
    (folder / "odd.yaml").unlink()


@pytest.mark.parametrize("starting", [False, True])
@pytest.mark.parametrize("texts", [None, A1111])
def test_a_picture_sets_the_form_to_what_the_command_has_of_it(whole, given, tmp_path, texts, starting):
    drawn = picture(
        whole, texts=texts, width=96, height=64, steps=4, cfg_scale=2.0, seed=7, prompt="a circle", hyena="level0"
    )
    before = dirty(whole, given, tmp_path)
    if starting:
        before |= {whole.form.components["init_image"]: str(drawn.path)}
        found = whole.order(applied(before, whole.take(str(drawn.path))))
    else:
        updates = whole.repeat(drawn)
        found = whole.order(applied(before, {k: v for k, v in updates.items() if k in before}))
    flags = ["--from", str(drawn.path), *(["--init_image", str(drawn.path)] if starting else [])]
    asked = parse(GenerateConfig, flags)
    ours = {"out_dir", "device", "from_image"} | {name for name in vars(asked) if name.endswith("_dir")}
    assert {k: v for k, v in vars(found).items() if k not in ours} == {
        k: v for k, v in vars(asked).items() if k not in ours
    }


def test_regions_stay_where_a_picture_has_none_or_is_not_read(whole, given):
    drawn = picture(whole, width=64, prompt="a circle")
    with pytest.raises(BadInput, match="has no regions"):
        whole.take_regions(drawn)
    answer = whole.panel.sent(whole.take_regions, str(drawn.path))
    assert answer.keys() == {whole.panel.told} and "has no regions" in answer[whole.panel.told]
    strange = whole.session.uploads / "strange.png"
    chunks = PngInfo()
    chunks.add_text("sui_image_params", "{}")
    Image.new("RGB", (8, 8)).save(strange, pnginfo=chunks)
    assert whole.take(str(strange)).keys() == {whole.redraw.notice}
    plain = whole.session.uploads / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    from sd_hyena.ui.regions_tab import read

    update, said = read(str(plain), whole.session)
    assert "holds no regions" in said and "below" in said and "value" not in update._constructor_args[0]
    assert update.props["src"].endswith("/plain.png")


def test_what_is_sent_is_the_chosen_picture_or_the_newest_or_why_there_is_none(whole, given):
    panel, seen = whole.panel, []
    act = lambda one: seen.append(one) or {}
    assert "there is no picture yet" in panel.sent(act, "")[panel.told] and not seen
    old, new = (picture(whole, f"image_{i:03d}.png", width=64) for i in (1, 2))
    panel.sent(act, ""), panel.sent(act, str(old.path))
    assert seen == [new, old]
    shown = whole.panel.pictures(-1)[0]
    picture(whole, "image_003.png", width=64)  # of another tab: the places of this page's gallery are now others
    for i, one in enumerate((new, old)):
        path, name = shown[i]
        assert panel.choose({"image": {"path": path}, "caption": name})[0] == str(one.path)
    assert panel.choose({"caption": "gone.png"}) == panel.choose(None) == ("", "")
    old.path.unlink()
    assert "no longer there" in panel.sent(act, str(old.path))[panel.told] and len(seen) == 2


def test_a_picture_is_sent_to_redraw_below_the_regions_and_to_both_sides_of_compare(whole, given):
    a, b = (picture(whole, f"image_{i:03d}.png", width=64) for i in (1, 2))
    sent = whole.start_from(a)
    copy = Path(sent[whole.form.components["init_image"]])
    assert copy.read_bytes() == a.path.read_bytes() and copy.parent == whole.session.uploads
    first = whole.compare.put(0, a, ["", ""], whole.tabs)
    assert first[whole.compare.slots] == [str(a.path), ""] and "now choose one for the right" in first[whole.panel.told]
    second = whole.compare.put(1, b, first[whole.compare.slots], whole.tabs)
    assert second[whole.compare.shown].count("<img") == 3 and "PSNR" in second[whole.compare.shown]


def test_a_large_picture_is_shown_small_and_fetched_whole(whole, given):
    drawn = picture(whole, width=1544, height=64)
    ((shown, name),) = whole.panel.pictures(-1)[0]
    assert Path(shown) != drawn.path and name == drawn.path.name
    assert "download" not in whole.panel.gallery.buttons  # it would be that of the small one
    from sd_hyena.ui.result_panel import told
    from sd_hyena.ui.session import served

    assert f"href='{served(drawn.path)}'" in told(drawn)


def test_a_fault_that_shows_while_it_is_drawn_is_put_at_its_field_and_the_look_goes_on_until_all_is_over(whole):
    def refuse(engine, job):
        raise BadInput("width=100 must be a multiple of 8")

    from sd_hyena.ui.job import Job

    panel, job = whole.panel, Job(work=refuse)
    whole.session.worker.submit(job)
    job.state = "failed"  # but not over yet: its seconds are not told
    *_, timer, faults = panel.look(job.number, 0)
    assert "active" not in getattr(timer, "_constructor_args", [{}])[0] and not isinstance(faults, str)
    job.run(None)
    *_, timer, faults = panel.look(job.number, 0)
    assert timer.active is False and json.loads(faults) == {"draw-width": job.fault}
    shown, timer, faults = whole.compare.look(job.number)
    assert job.fault in shown and timer.active is False and "draw-width" in faults
    train = whole.distil.answered(job.number)
    assert job.fault in train[0] and json.loads(train[2]) == {"train-width": job.fault}


def test_what_is_refused_leaves_the_job_before_alone_if_it_is_over_and_followed_if_it_goes_on(whole, given):
    from sd_hyena.ui.job import Job

    job = whole.session.worker.submit(Job(work=lambda engine, job: "counted"))
    bad = with_options(whole, given, width=100)
    panel, compare, distil = whole.panel, whole.compare, whole.distil
    train = bad | {distil.form.components["width"]: 100}
    asked = [
        (whole.begin, panel.job),
        (compare.begin, compare.job),
        (distil.ask_estimate, distil.job),
        (distil.ask_buys, distil.job),
    ]
    assert [act(train | {state: job.number})[state] for act, state in asked] == [job.number] * 4
    job.run(None)
    assert [act(train | {state: job.number})[state] for act, state in asked] == [0] * 4
    for shown, *rest in (panel.look(0, 0), compare.look(0), distil.answered(0)):  # the line that refuses stays
        assert not isinstance(shown, str) and any(getattr(one, "active", None) is False for one in rest)


def test_faults_of_regions_are_put_at_their_entry_and_of_the_right_side_at_its_text(whole, given):
    bad = [REGION, REGION | {"neg_prompt": 3}]
    faults = json.loads(whole.check(with_options(whole, given, json.dumps(bad), width=64)))
    assert list(faults) == ["region-2"] and "negative_prompt=3" in faults["region-2"]
    bad = [REGION | {"mask": "/etc/passwd"}]
    assert list(json.loads(whole.check(with_options(whole, given, json.dumps(bad), width=64)))) == ["region-1"]
    assert list(json.loads(whole.check(with_options(whole, given, "{", width=64)))) == ["regions"]
    answer = whole.compare.begin(with_options(whole, given, width=64) | {whole.compare.also: "steps: 0\nwidth: 100"})
    assert list(json.loads(answer[whole.faults])) == ["compare-also"] and "width=100" in answer[whole.compare.shown]
    for text in ("steps: 2020-01-01", "out_dir: /tmp", "- a"):
        answer = whole.compare.begin(with_options(whole, given, width=64) | {whole.compare.also: text})
        assert list(json.loads(answer[whole.faults])) == ["compare-also"]


def test_settings_are_kept_while_some_are_wrong_and_those_of_the_other_tabs_are_kept_too(whole, given):
    whole.check(with_options(whole, given, "{", width=100, steps="x", prompt="a long one", scheduler="euler"))
    options, regions = whole.session.last()
    assert (options["prompt"], options["scheduler"], options["width"], regions) == ("a long one", "euler", 100, "{")
    assert "steps" not in options
    compare = whole.compare
    compare.keep(["level0"], ["landmarks:64:IN01", "gone.pt"], "steps: 3", "")  # of a page that is being opened
    assert compare.open()[compare.left]["value"] == [compare.left.value[0]]
    compare.keep(["level0"], ["landmarks:64:IN01", "gone.pt"], "steps: 3", "yes")
    found = compare.open()
    assert [found[one]["value"] for one in compare.settings] == [["level0"], ["landmarks:64:IN01"], "steps: 3"]
    assert compare.settle(given).keys() == set(compare.settings) and not compare.settle(applied(given, found))
    parts, distil = whole.distil.form.components, whole.distil
    recipe = distil.recipe.choices[1][0]
    whole.keep_distil(given | {parts["n_steps"]: 30, parts["width"]: 100, distil.recipe: recipe})
    found = distil.open()
    assert (found[parts["n_steps"]]["value"], found[parts["width"]]["value"]) == (30, 100)
    assert found[distil.recipe]["value"] == recipe and found[distil.single].visible == "hidden"
    assert distil.settle(given).keys() >= {parts["n_steps"], parts["width"], distil.recipe}
    assert not distil.settle(applied(given, {k: v for k, v in found.items() if k in given}))
    for name in ("last", "last-compare", "last-training"):
        (whole.session.state / f"{name}.yaml").unlink()


def test_what_a_page_lost_while_it_was_being_opened_is_shown_once_more_and_nothing_else(whole, given):
    parts, regions = whole.form.components, json.dumps([REGION])
    whole.session.remember(whole.form.values(given) | {"steps": 9, "hyena": "landmarks:64:IN01"}, regions)
    found = whole.settle(given)
    assert found.keys() == {parts["steps"], parts["hyena"], whole.regions.editor}
    assert found[parts["steps"]]["value"] == "9"
    given |= {parts["steps"]: "9", parts["hyena"]: ["landmarks:64:IN01"], whole.regions.editor: regions}
    assert "value" not in whole.settle(given)
    before = (whole.session.state / "last.yaml").read_bytes()
    whole.check(given | {parts["steps"]: "1", whole.opened: ""})  # of a page that does not show the last settings yet
    assert (whole.session.state / "last.yaml").read_bytes() == before
    whole.check(given | {parts["steps"]: "1"})
    assert whole.session.last()[0]["steps"] == 1


def test_a_prompt_of_a_file_is_refused_at_its_field(whole, given):
    faults = json.loads(whole.check(with_options(whole, given, width=64, prompt="@lines.txt")))
    assert (
        list(faults) == ["draw-prompt"] and whole.check(with_options(whole, given, width=64, prompt=" @home")) == "{}"
    )


def test_the_speed_of_a_model_is_known_to_the_next_session(whole, given, monkeypatch):
    from sd_hyena.generate import forecast
    from sd_hyena.ui.session import Session

    monkeypatch.setattr(forecast, "forecast", lambda config: SimpleNamespace(operations=100))
    session, config = Session(whole.session.config), GenerateConfig(device="cpu", width=64)
    drawn = picture(whole, width=64)
    session.take(drawn)
    assert session.rate(config) is None  # a model was loaded for it
    session.take(drawn)
    assert Session(whole.session.config).rate(config) == session.rate(config) == 50.0
    assert session.rate(dataclasses.replace(config, dtype="bfloat16")) is None


def test_what_is_old_goes_unless_settings_presets_or_their_regions_name_it(whole, tmp_path):
    assert whole.blocks.delete_cache is None  # gradio's deletes all uploads when the command ends
    state = tmp_path / "state"
    names = ["uploads/ab/kept.png", "uploads/ab/old.png", "uploads/cd/old.png", "uploads/m1.png", "uploads/m2.png"]
    names += [
        "uploads/a,b.png",
        "uploads/1.png",
        "uploads/2.png",
        "regions/preset.json",
        "regions/old.json",
        "small/x.jpg",
    ]
    at = {name: state / name for name in names}
    for path in at.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({"bbox_controls": [{"mask": str(at["uploads/m2.png"])}]}) if path.suffix == ".json" else ""
        )
    last, preset = state / "last.yaml", tmp_path / "mine.yaml"
    regions = json.dumps([{"mask": str(at["uploads/m1.png"]), "prompt": "a, b"}])
    pictures = f"{at['uploads/1.png']},{at['uploads/2.png']}"
    last.write_text(
        yaml.safe_dump(
            {"init_image": str(at["uploads/ab/kept.png"]), "page_regions": regions, "control_image": pictures}
        )
    )
    preset.write_text(
        yaml.safe_dump({"regions": str(at["regions/preset.json"]), "init_image": str(at["uploads/a,b.png"])})
    )
    assert tidy(state, [last, preset], age=60) == []
    gone = tidy(state, [last, preset, tmp_path / "none.yaml"], age=-1)
    assert {path.relative_to(state).as_posix() for path in gone} == {
        "uploads/ab/old.png",
        "uploads/cd/old.png",
        "regions/old.json",
        "small/x.jpg",
    }
    assert not (state / "uploads" / "cd").exists() and last.exists()


@pytest.fixture
def silent(monkeypatch):
    """Trainings that are started but do nothing: the commands that they would have run."""
    commands, started = [], subprocess.Popen

    def popen(command, **given):
        commands.append(command[3:])
        return started([sys.executable, "-S", "-c", ""], **given)

    monkeypatch.setattr("sd_hyena.ui.trainings.subprocess.Popen", popen)
    return commands


def ended(training):
    until = time.monotonic() + 30
    while training.alive and time.monotonic() < until:
        time.sleep(0.02)
    return training


def test_each_recipe_has_a_folder_of_its_own_and_the_page_foretells_the_stages_that_would_run(
    whole, given, silent, tmp_path
):
    distil, parts = whole.distil, whole.distil.form.components
    folder = Path(whole.session.config.train_dir)
    for name in (
        "tiny_sd_level0",
        "tiny_sd_all",
        "tiny_sd_level0",
    ):  # of no effect beside a recipe: neither used nor judged
        answer = distil.begin(given | {distil.recipe: name, parts["width"]: 100, parts["n_steps"]: 7})
        assert answer[distil.faults] == "{}", answer
        ended(distil.trainings.all()[answer[distil.runs].value])
    stages = [[step({}) for step in read_recipe(command[1:])] for command in silent]  # as the command itself reads them
    assert len({one[0].out_dir for one in stages}) == 3
    assert all(
        Path(one.out_dir).parent == folder and one.cache_dir == str(folder / "cache") for run in stages for one in run
    )
    asked = distil.stages_asked(given | {distil.recipe: "tiny_sd_all", parts["width"]: 100})
    places = dict(out_dir="", cache_dir="")
    assert [dataclasses.replace(one, **places) for one in asked] == [
        dataclasses.replace(one, **places) for one in stages[1]
    ]
    said = distil.chosen("tiny_sd_all")[distil.stages]
    assert all(f"{one.n_steps} steps" in said for one in stages[1]) and said.count("<li>") == len(stages[1])
    again = distil.go_on(next(iter(distil.trainings.all())), 400)
    ended(distil.trainings.all()[again[distil.runs].value])
    assert silent[-1] == silent[-2]  # which goes on where it stopped
    with pytest.raises(BadInput, match="width=100"):
        distil.order(given | {parts["width"]: 100})


def test_a_training_is_made_longer_never_shorter(silent, tmp_path):
    trainings, run = Trainings(tmp_path / "records"), tmp_path / "out" / "run"
    run.mkdir(parents=True)
    config = TrainConfig(out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"), n_steps=30, width=64)
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    first = ended(trainings.start(config))
    Path(first.log).write_text(f"run {run}\n" + "step\n" * 30_000)  # more than the end that is shown
    for asked, steps in ((0, 30), (10, 30), (50, 50)):
        ended(trainings.resume(first.name, asked))
        stored = yaml.safe_load(Path(silent[-1][2]).read_text())
        assert (stored["n_steps"], stored["resume"]) == (steps, str(run))


def test_how_a_training_ended_is_told_and_a_page_follows_the_newest(whole, given, silent):
    distil = whole.distil
    config, recipe = distil.order(given)
    training = ended(distil.trainings.start(config))
    assert recipe is None and distil.follow_newest()[0].value == training.name
    log = Path(training.log)
    for text, state in {
        "step 3\n\nstudent: a, newest: b\nnext: python -m sd_hyena generate\n": "done",
        "saved at step 3\nterminated\n": "cancelled",
        "note: x\nerror: RuntimeError: no memory\n": "failed",
        "step 3": "failed",
        "nothing to do: x has 3 of 3 steps\n": "done",
    }.items():
        log.write_text(text)
        assert training.state == state
        assert f"<b>{state}" in distil.follow_newest()[2]
    one = dataclasses.replace(training, arguments=("recipe", "x.yaml"))
    log.write_text("next: python\n== stage 2 of 2")  # of its first stage; it was killed in the second
    assert one.state == "failed"


def test_students_are_tried_with_their_own_teacher_or_it_is_said_that_it_is_not_there(whole, given, silent, tmp_path):
    distil, parts = whole.distil, whole.form.components
    training = ended(distil.trainings.start(distil.order(given)[0]))
    assert "no students yet" in whole.try_it(training.name)[distil.answer]
    run = Path(whole.session.config.train_dir) / "tried"
    run.mkdir(parents=True)
    Path(training.log).write_text(f"run {run}\n")
    save_file({}, run / "Hyena-00030.safetensors")
    for teacher, there in (("", True), (str(tmp_path / "other"), False)):
        (run / "config.yaml").write_text(yaml.safe_dump({"teacher_model": teacher}))  # of a recipe, the file's own
        found = whole.try_it(training.name)
        if there:
            assert found[parts["model"]]["value"] == SHIPPED and "Hyena-00030" in found[parts["hyena"]]["value"][0]
        else:
            assert found.keys() == {distil.answer} and "&#x27;other&#x27; is in none" in found[distil.answer]
