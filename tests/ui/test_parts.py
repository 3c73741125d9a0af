"""What the page is made of, without a browser: the form, what files may be named, trainings that are found again."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops, vae_flops
from sd_hyena.cost.peak import peak_bytes, unet_peak_bytes
from sd_hyena.errors import BadInput
from sd_hyena.generate.forecast import forecast
from sd_hyena.options.command_line import option
from sd_hyena.options.from_image import OURS_ALONE
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.untrained import untrained
from sd_hyena.ui.curves import chart, curves_of
from sd_hyena.ui.folders import SHIPPED, Folders, kind_of
from sd_hyena.ui.page_config import PageConfig
from sd_hyena.ui.trainings import Training, Trainings
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def page():
    """What needs gradio, which takes five seconds to import: here, so that collecting tests does not."""
    gradio = pytest.importorskip("gradio", reason="no gradio; pip install -r requirements-ui.txt")
    from sd_hyena.ui import form, region_editor, session

    return SimpleNamespace(gradio=gradio, form=form, region_editor=region_editor, session=session)


@pytest.fixture
def config(tmp_path):
    for name in ("models", "loras", "students"):
        (tmp_path / name).mkdir()
    (tmp_path / "loras" / "deep").mkdir()
    for name in ("gold", "deep/blue"):
        save_file({}, tmp_path / "loras" / f"{name}.safetensors")
    places = {f"{name}_dir": str(tmp_path / name) for name in ("out", "train", "log")}
    return PageConfig(lora_dir=str(tmp_path / "loras"), student_dir=str(tmp_path / "students"), **places)


def form_of(page, config_class, config, left_out=()):
    form = page.form.Form(config_class, Folders(config), "x", left_out)
    with page.gradio.Blocks():
        form.add_groups()
    return form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Later(GenerateConfig):
    """A config with an option more."""

    sparkle: int = option(3, "how much it sparkles", group="expert")


@pytest.mark.parametrize("config_class", [GenerateConfig, TrainConfig, Later])
def test_every_option_has_its_field_but_for_the_machines_own(page, config, config_class):
    form = form_of(page, config_class, config)
    places = {f.name for f in dataclasses.fields(config_class) if kind_of(f) == "place"}
    assert form.components.keys() == {f.name for f in dataclasses.fields(config_class)} - places
    assert all(component.label for component in form.components.values())
    given = {component: component.value for component in form.components.values()}
    assert config_class(**form.values(given)) == config_class()  # untouched, the form asks for the defaults


def test_what_a_form_shows_it_reads_back(page, config):
    form = form_of(page, GenerateConfig, config, page.session.HIDDEN)
    folders = Folders(config)
    lora = folders.value("lora", "loras", ["gold.safetensors:0.5", "deep/blue.safetensors"])
    options = dict(steps=7, prompt="a circle", cfg_scale=2.5, overlap=None, scheduler="euler", karras=True, lora=lora)
    options |= dict(hyena="landmarks:64:IN01", width=0, control_scale="1,0.5", tiled_vae="exact")
    updates, strange = form.shown(options)
    assert not strange
    values = form.values({c: updates.get(c, {"value": c.value})["value"] for c in form.components.values()})
    assert {name: values[name] for name in options} == options
    (line,) = form.shown({"lora": "/elsewhere/red.safetensors"})[1]
    assert line == "lora 'red.safetensors' is in none of the page's folders"


def test_uploads_are_shown_again_while_they_are_there_and_a_line_names_those_that_are_not(page, config, tmp_path):
    form = form_of(page, GenerateConfig, config, page.session.HIDDEN)
    a, b = (tmp_path / "uploads" / name for name in ("a.png", "b,c.png"))
    options = dict(init_image=str(a), control_image=f"{a},{b}", prompt="x")

    def shown(uploads=tmp_path / "uploads"):
        updates, lost = form.shown(options, uploads)
        return {c.elem_id.removeprefix("x-"): u["value"] for c, u in updates.items()}, lost

    gone = {"prompt": "x", "init_image": None, "control_image": []}
    assert shown()[0] == gone and shown()[1][0].startswith("init_image 'a.png' is no upload of this page")
    a.parent.mkdir()
    for path in (a, b):
        path.write_bytes(b"")
    assert shown() == ({"prompt": "x", "init_image": str(a), "control_image": [str(a), str(b)]}, [])
    assert shown(None)[0] == gone
    values = {component: component.value for component in form.components.values()}
    values[form.components["control_image"]] = [(str(a), None), (str(b), None)]  # as a gallery answers
    assert form.values(values)["control_image"] == f"{a},{b}"
    options["init_image"] = str(tmp_path / "loras" / "gold.safetensors")
    assert shown()[0]["init_image"] is None and "gold.safetensors" in shown()[1][0]


def test_alternatives_are_not_joined_and_a_name_beside_the_model_is_known(page, config):
    form, folders = form_of(page, GenerateConfig, config, page.session.HIDDEN), Folders(config)
    hyena = form.components["hyena"]
    updates, lost = form.shown({"hyena": "landmarks:64:IN01,level0"})
    assert updates[hyena]["value"] == ["landmarks:64:IN01"] and "one alternative at a time" in lost[0]
    for entry in ("level0", folders.value("hyena", "students", ["level0"])):  # as a picture says it, and as a form does
        assert folders.names("students", f"{entry}+landmarks:64:IN01") == (["level0", "landmarks:64:IN01"], [])
    with pytest.raises(BadInput, match="alternatives are generate"):
        folders.value("hyena", "students", ["a.pt,b.pt"])


def test_every_upload_has_its_help_and_what_differs_on_the_page_is_said_at_the_field(page, config):
    form = form_of(page, GenerateConfig, config)
    every = list(_below(form.components["prompt"]))
    helps = {block.elem_id: block.value for block in every if str(block.elem_id).endswith("-help")}
    for name in form.uploads():
        assert form.fields[name].metadata["help"].split()[0] in helps[f"x-{name}-help"]
    assert "@FILE is generate.py's" in form.components["prompt"].info
    assert "gold.safetensors:0.5" in form.components["lora"].info


def _below(component):
    """All blocks of the page that a component stands in."""
    root = component
    while root.parent is not None:
        root = root.parent
    waiting = [root]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += getattr(one, "children", [])


def test_a_fault_is_put_at_its_field(page, config):
    form = form_of(page, GenerateConfig, config)
    for given in (dict(width=100), dict(steps=-1), dict(karras=True), dict(strength=2.0), dict(controlnet="a")):
        with pytest.raises(BadInput) as error:
            GenerateConfig(**given)
        assert form.faulty(str(error.value)) in given
    assert form.faulty("error: nothing that is a field") == ""


@pytest.mark.parametrize("name", ["/etc/passwd", "../loras/gold.safetensors", "gold", "gold.safetensors:x/y"])
def test_a_browser_names_files_of_the_folders_and_nothing_else(config, name):
    with pytest.raises(BadInput, match="none of the page's folders"):
        Folders(config).value("lora", "loras", [name])


def test_a_config_that_names_a_file_elsewhere_is_refused_links_included(config, tmp_path):
    folders, inside = Folders(config), tmp_path / "loras" / "deep" / "blue.safetensors"
    folders.check(GenerateConfig(lora=f"{inside}:0.5"), [])
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "loras" / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (tmp_path / "secret.png", tmp_path / "loras" / "link.png", tmp_path / "loras" / ".." / "secret.png"):
        with pytest.raises(BadInput, match="outside the page's folders"):
            folders.check(GenerateConfig(init_image=str(path)), [])
        folders.check(GenerateConfig(init_image=str(path)), [tmp_path])
    assert Folders(config).value("model", "models", SHIPPED) == ""


def test_regions_from_a_browser_keep_the_masks_that_were_uploaded_and_name_no_other_file(page, config):
    session = page.session.Session(config)
    (session.uploads / "mask.png").write_bytes(b"grey")
    control = dict(x=0.0, y=0.0, w=0.5, h=0.5, prompt="a circle", seed=3)
    given = [control | {"mask": "/etc/passwd"}, control | {"mask": str(session.uploads / "mask.png")}]
    with pytest.raises(BadInput, match="regions, region 1, names a file outside the page's folders"):
        session.order({"width": 64}, json.dumps(given))
    stored = json.loads(Path(session.order({"width": 64}, json.dumps(given[1:])).regions).read_text())
    assert stored["bbox_controls"][0]["mask"] == str(session.uploads / "mask.png")
    value, lines = session.regions_of(json.dumps(given))
    left, right = page.region_editor.regions_of(value)
    assert (left.mask, left.seed, left.prompt, right.mask) == ("", 3, "a circle", given[1]["mask"])
    assert lines == ["region 1: its mask 'passwd' is in none of the page's folders; give it anew"]
    assert page.region_editor.regions_of(page.region_editor.value_of([left, right])) == (left, right)
    with pytest.raises(BadInput, match="damaged"):
        page.region_editor.regions_of("{")


def test_other_machines_come_in_only_with_a_password(tmp_path):
    with pytest.raises(BadInput, match="give --auth"):
        PageConfig(listen="0.0.0.0")
    for auth in ("name", "name:", ":word"):
        with pytest.raises(BadInput, match="NAME:PASSWORD"):
            PageConfig(auth=auth)
    (tmp_path / "word").write_text("me:with:colons\n")
    open_one = PageConfig(listen="0.0.0.0", auth=str(tmp_path / "word"))
    assert open_one.credentials == ("me", "with:colons") and PageConfig().address == "127.0.0.1"


def test_settings_and_presets_survive_and_presets_are_what_the_command_reads(page, config):
    Session = page.session.Session
    session = Session(config)
    assert session.last() == ({}, "[]")
    session.remember({"steps": 5, "prompt": "größe", "out_dir": "elsewhere"}, '[{"x": 0}]')
    assert Session(config).last() == ({"steps": 5, "prompt": "größe"}, '[{"x": 0}]')
    (session.state / "last.yaml").write_text("{")
    assert session.last() == ({}, "[]")
    session.save_preset("my own", GenerateConfig(width=64, steps=5))
    assert session.preset("my own") == {"width": 64, "height": 0, "steps": 5} or session.preset("my own")["steps"] == 5
    for name in ("../up", "", "tiny_sd", "a/b"):
        with pytest.raises(BadInput, match="preset="):
            session.save_preset(name, GenerateConfig())
    assert not OURS_ALONE or "out_dir" not in session.preset("my own")


@pytest.mark.gate
def test_the_forecast_counts_what_the_unet_and_the_vae_are_counted_at(shared_pipe):
    unet = shared_pipe.unet
    vae = vae_flops(shared_pipe.vae, (12, 20))[1]
    plain = GenerateConfig(width=160, height=96, steps=3, cfg_scale=4.0, prompt="x", device="cpu", num_images=2)
    found = forecast(plain)
    assert found.operations == found.as_teacher == 3 * 2 * unet_flops(unet, (12, 20)) + vae and found.pictures == 2
    student = forecast(dataclasses.replace(plain, hyena="landmarks:64:IN01"))
    (site,) = [site for site in find_sites(unet) if site.short == "IN01"]
    (made,) = untrained(unet, "IN01", 64).values()
    saved = attention_flops(site, (12, 20)) - folded_flops(made.spec, (12, 20))
    assert student.as_teacher - student.operations == 3 * 2 * saved and student.sites == ("IN01",)
    tiled = dataclasses.replace(
        plain, tiled_diffusion="mixture", tile_width=8, tile_height=12, overlap=0, cfg_scale=0.0
    )
    assert (
        forecast(tiled).operations == 3 * 3 * unet_flops(unet, (12, 8)) + vae
    )  # 20 cells in tiles of 8 without overlap


@pytest.mark.gate
def test_the_forecast_of_a_growing_picture_counts_all_its_stages(shared_pipe):
    growing = GenerateConfig(width=512, height=512, steps=10, cfg_scale=1.0, prompt="x", device="cpu", grow="redraw")
    found = forecast(growing)
    assert "256x256 (10 steps) -> 512x512 (3 steps)" in found.line()
    small, large = (
        forecast(dataclasses.replace(growing, grow="off", width=side, height=side, steps=steps))
        for side, steps in ((256, 10), (512, 3))
    )
    encoded = vae_flops(shared_pipe.vae, (64, 64))[0]
    assert found.operations == small.operations + large.operations + encoded and "grows" not in large.line()
    assert found.gib == large.gib > small.gib


@pytest.mark.gate
def test_memory_in_hand_is_what_is_alive_at_once_and_grows_with_the_batch(shared_pipe):
    def call():
        a = torch.empty(1000, 250)  # 1 MB each
        b = a * 2
        del a
        c, d = b + 1, b.view(-1)
        del b, d
        return c @ c.T.contiguous()  # two of them, and 4 MB

    assert peak_bytes(call) == 6_000_000
    with FakeTensorMode():
        assert peak_bytes(call) == 6_000_000
    one, two = (unet_peak_bytes(shared_pipe.unet, (8, 8), n, torch.float32) for n in (1, 2))
    assert 1.8 < two / one < 2.1


def test_curves_of_a_resumed_run_are_one_and_half_a_line_is_passed_over(tmp_path):
    for name, rows in {"csv-1": "1,0.5,\n2,0.4,0.3\n3,0.35,", "csv-2": "3,0.2,\n4,0.1,0.05\n5,0."}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,train/loss/IN01,val/relative_mse/IN01\n{rows}")
    curves = curves_of(tmp_path)
    assert curves["train/loss/IN01"] == [(1, 0.5), (2, 0.4), (3, 0.2), (4, 0.1), (5, 0.0)]
    assert curves["val/relative_mse/IN01"] == [(2, 0.3), (4, 0.05)]
    drawn = chart("loss", {"<IN01>": curves["train/loss/IN01"]})
    assert drawn.count("<polyline") == 1 and "&lt;IN01&gt; 0.1" in drawn and chart("none", {"a": [(1, 0.0)]}) == ""


def test_a_training_is_found_by_its_record_and_a_strangers_process_is_not_it(tmp_path):
    trainings = Trainings(tmp_path)
    config = TrainConfig(out_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "logs"), target="IN01", width=64)
    code = "import time; print('run out/2026', flush=True); time.sleep(60)"
    started = subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:  # what it starts is a sleep: a true training is in test_page.py
        patch.setattr(subprocess, "Popen", lambda _, **given: started([sys.executable, "-c", code], **given))
        training = trainings.start(config)
    try:
        assert trainings.running() == training == Trainings(tmp_path).all()[training.name] and training.alive
        stranger = dataclasses.replace(training, began="1")
        assert not stranger.alive
        with pytest.raises(BadInput, match="is running"):
            trainings.start(config)
        until = time.monotonic() + 30
        while training.run is None and time.monotonic() < until:
            time.sleep(0.05)
        assert training.run == Path("out/2026")
    finally:
        training.cancel()
    until = time.monotonic() + 30
    while training.alive and time.monotonic() < until:
        time.sleep(0.05)
    assert not training.alive and trainings.running() is None
    (tmp_path / "broken.json").write_text("{")
    assert list(Trainings(tmp_path).all()) == [training.name]
    gone = Training("x", 2**22 + 1, "5", (), str(tmp_path / "no"), "", "", "")
    assert not gone.alive and gone.lines == [] and gone.run is None


def test_without_gradio_the_command_says_so_in_a_line_and_its_help_needs_neither_it_nor_torch(capsys, monkeypatch):
    from sd_hyena.ui import __main__ as page

    monkeypatch.setattr(page, "find_spec", lambda _: None)
    assert page.command(["--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the page needs gradio") and said.count("\n") == 1
    code = "import sys; from sd_hyena.ui.__main__ import command; command(['--help'])\n"
    code += "assert not {'gradio', 'torch'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and "--listen" in done.stdout, done.stderr


def test_gradio_is_imported_by_the_page_alone_and_the_page_by_nothing():
    for path in (ROOT / "sd_hyena").rglob("*.py"):
        inside = path.parent.name == "ui"
        text = path.read_text("utf-8")
        assert inside or not ("import gradio" in text or "from sd_hyena.ui" in text or "import sd_hyena.ui" in text), (
            path
        )
