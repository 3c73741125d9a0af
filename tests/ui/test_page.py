"""The page in a real browser, on the model that ships, with real students and trainings."""

import json
import re
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sd_hyena.files.picture import read_metadata
from sd_hyena.large.regions import from_dict
from tests.ui.conftest import PICTURE, choose, ended, fill, newest, tab

CELL = 8
SLOW = """() => { const real = setTimeout; window.setTimeout = (act, ms, ...rest) => real(act, ms === 400 ? 20000 : ms, ...rest); }"""


def test_a_changed_prompt_is_drawn_with_a_preview_and_progress_that_moves(opened, served):
    page = opened()
    open_ = page.locator("#draw-cfg_scale input")
    assert (open_.input_value(), open_.get_attribute("placeholder")) == ("", "the model's: 3")
    fill(page, **PICTURE | {"steps": 30, "width": 128}, prompt="a blue square on stripes")
    page.locator("#draw").click()
    seen, previews = [], set()
    while not page.locator("#stage [data-state=done]").count():
        if found := re.search(r"step ([\d.]+) of 31", page.locator("#stage").inner_text()):
            seen.append(float(found[1]))
        if page.locator("#stage img[alt=preview]").count():
            previews.add(page.locator("#stage img").get_attribute("src"))
    assert seen == sorted(seen) and len(set(seen)) >= 2 and previews
    path = newest(served.outputs)
    config = read_metadata(path)["config"]
    assert (config["prompt"], config["steps"], config["seed"]) == ("a blue square on stripes", 30, 5)
    assert config["cfg_scale"] == 3.0  # the model's, for its field was left open
    with Image.open(path) as image:
        assert image.size == (128, 128) and "blue square" in image.info["parameters"]
    page.wait_for_function(f"document.querySelector('#gallery img')?.src.includes('{path.name}')")
    with urllib.request.urlopen(page.locator("#gallery img").first.get_attribute("src")) as answer:
        assert answer.read() == path.read_bytes()  # served in place: the very file, with all that it says


def test_regions_dragged_with_the_mouse_are_those_of_the_picture_to_one_cell(opened, served):
    page = opened()
    fill(page, **PICTURE | {"steps": 1, "width": 128, "height": 96}, prompt="stripes")
    tab(page, "Regions")
    page.locator("#regions").get_by_role("button", name="delete all regions").click()
    stage = page.locator("#regions .stage")
    page.wait_for_function(
        "document.querySelector('#regions .stage').style.aspectRatio.replaceAll(' ', '') === '128/96'"
    )
    box = stage.bounding_box()
    assert box["width"] / box["height"] == pytest.approx(128 / 96, rel=0.02)

    def drag(start, end):
        at = lambda p: (box["x"] + p[0] * box["width"] / 128, box["y"] + p[1] * box["height"] / 96)
        page.mouse.move(*at(start))
        page.mouse.down()
        page.mouse.move(*at([(a + b) / 2 for a, b in zip(start, end, strict=True)]))
        page.mouse.move(*at(end))
        page.mouse.up()

    drag((8, 8), (40, 40))
    drag((64, 8), (104, 48))
    drag((16, 56), (120, 88))
    assert page.locator("#regions .region").count() == 3
    drag((24, 24), (40, 32))  # the first is moved by 16, 8
    drag((104, 48), (120, 64))  # the second is larger by 16, 16
    page.locator("#regions .region").nth(2).focus()
    page.keyboard.press("Delete")
    page.locator("#regions textarea").first.fill("a red circle")
    page.locator("#title").click()
    assert "has no region" in page.locator("#regions .hint").inner_text()
    page.locator("#draw").click()
    ended(page)
    found = read_metadata(newest(served.outputs))["regions"]["bbox_controls"]
    pixels = [[round(r["x"] * 128), round(r["y"] * 96), round(r["w"] * 128), round(r["h"] * 96)] for r in found]
    assert np.abs(np.array(pixels) - [[24, 16, 32, 32], [64, 8, 56, 56]]).max() <= CELL
    assert [region["prompt"] for region in found] == ["a red circle", ""]


def test_regions_obey_the_keyboard_and_come_back_from_json_and_from_a_picture(opened, served, tmp_path):
    page = opened()
    fill(page, width=128, height=128)
    controls = [dict(x=0.25, y=0.25, w=0.5, h=0.25, prompt="a circle", blend_mode="Foreground", feather_ratio=0.4)]
    path = tmp_path / "regions.json"
    path.write_text(json.dumps({"bbox_controls": controls}))
    tab(page, "Regions")
    page.get_by_test_id("load: JSON or picture-upload-button").set_input_files(path)
    region = page.locator("#regions .region")
    page.wait_for_function("document.querySelectorAll('#regions .region').length === 1")
    assert page.locator("#regions textarea").first.input_value() == "a circle"
    assert float(region.evaluate("node => parseFloat(node.style.getPropertyValue('--edge'))")) > 0
    places = lambda: region.evaluate_all(
        "ns => ns.map(n => [n.style.left, n.style.top, n.style.width, n.style.height])"
    )
    region.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    assert places() == [["31.25%", "25%", "50%", "31.25%"]]
    with page.expect_download() as saved:
        page.locator("#regions-save").click()
    (stored,) = from_dict(json.loads(Path(saved.value.path()).read_text()))
    assert (stored.x, stored.y, stored.w, stored.h) == (0.3125, 0.25, 0.5, 0.3125) and stored.feather_ratio == 0.4
    region.focus()
    page.keyboard.press("Delete")
    assert places() == []
    page.locator("#regions").get_by_role("button", name="undo").click()
    assert places() == [["31.25%", "25%", "50%", "31.25%"]]
    page.keyboard.press("Tab")  # on to redo, and so on: everything can be reached
    label = lambda: page.evaluate("document.activeElement.getAttribute('aria-label') || ''")
    assert label() == "redo (Ctrl+Y)"
    page.locator("#regions").get_by_role("button", name="add a region in the middle").click()
    region.nth(1).focus()
    page.keyboard.press("Control+z")  # what had the focus goes, the keys stay
    page.keyboard.press("Control+z")
    assert places() == [["31.25%", "25%", "50%", "25%"]] and label().startswith("canvas")
    page.keyboard.press("Control+y")
    region.focus()
    page.keyboard.press("Delete")
    page.keyboard.press("Control+z")
    assert places() == [["31.25%", "25%", "50%", "31.25%"]]
    page.locator("#regions").get_by_role("button", name="add a region in the middle").click()
    page.get_by_role("button", name="region 2 up").click()
    assert label() == "region 1 up" and places()[0] == ["25%", "25%", "50%", "50%"]
    text = page.locator("#regions textarea").first
    text.press_sequentially("a square")  # and the field is not left
    last = served.outputs / ".page" / "last.yaml"
    for _ in range(200):
        if last.exists() and "a square" in last.read_text():
            break
        page.wait_for_timeout(50)
    assert "a square" in last.read_text()
    page.evaluate(SLOW)  # what is typed last is not sent before the file comes
    text.press_sequentially("s")
    assert (label(), text.input_value()) == ("prompt of region 1", "a squares")
    chunks = PngInfo()
    chunks.add_text("sd_hyena", json.dumps({"regions": {"bbox_controls": [controls[0] | {"prompt": "of a picture"}]}}))
    Image.new("RGB", (128, 128), "navy").save(tmp_path / "regions.png", pnginfo=chunks)
    page.get_by_test_id("load: JSON or picture-upload-button").set_input_files(tmp_path / "regions.png")
    page.wait_for_function("document.querySelector('#regions textarea').value === 'of a picture'")
    page.wait_for_function("document.querySelector('#regions .underlay').naturalWidth === 128")
    page.locator("#regions .stage").focus()
    page.keyboard.press("Control+z")  # what was loaded has not wiped what was there
    assert page.locator("#regions textarea").first.input_value() == "a squares"


def test_a_picture_is_sent_wherever_it_is_wanted_and_the_page_comes_to_rest(opened, served):
    page, asked = opened(), []
    fill(page, **PICTURE)  # one field after another, faster than a look at the settings takes
    page.locator("#draw").click()
    ended(page)
    page.on("request", lambda request: asked.append(request.url))
    come = {
        "redraw it": ("Redraw", "#draw-init_image img"),
        "compare: left": ("Redraw", ""),  # there is nothing to see before there are two
        "compare: right": ("Compare", "#pair img.left"),
        "its regions": ("Compare", "#told :text('has no regions')"),
        "its settings": ("Draw", "#draw-width"),
    }
    for button, (name, seen) in come.items():
        page.get_by_role("button", name=button, exact=True).click()
        page.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")
        if seen:
            page.wait_for_selector(seen)
        page.wait_for_timeout(1500)
        asked.clear()
        page.wait_for_timeout(1500)
        assert len([url for url in asked if "/gradio_api/" in url and "/file=" not in url]) <= 1, button


def test_a_drawing_is_cancelled_in_its_middle_and_the_next_one_is_drawn(opened, served):
    page = opened()
    before = set(served.outputs.glob("*.png"))
    fill(page, **PICTURE | {"steps": 400, "width": 128})
    page.locator("#draw").click()
    page.wait_for_selector("#stage progress[value]")
    began = time.monotonic()
    page.locator("#cancel").click()
    ended(page, "ended")
    assert time.monotonic() - began < 30 and set(served.outputs.glob("*.png")) == before
    fill(page, steps=1)
    page.locator("#draw").click()
    ended(page)
    assert len(set(served.outputs.glob("*.png")) - before) == 1


def test_a_wrong_size_is_said_at_its_field_and_nothing_is_begun(opened, served):
    page = opened()
    fill(page, **PICTURE | {"width": 100})
    page.locator("#draw").click()
    fault = page.locator("#draw-width .fault-here")
    fault.wait_for()
    assert "width=100 must be a multiple of 8" in fault.inner_text()
    assert page.locator("#draw-width input").first.get_attribute("aria-invalid") == "true"
    fill(page, width=64)
    page.wait_for_function("!document.querySelector('#draw-width .fault-here')")
    page.wait_for_function("document.querySelector('#forecast').innerText.includes('TFLOP a picture')")


def test_a_dropped_picture_of_a1111_fills_the_form_and_says_what_was_not_taken(opened, tmp_path):
    text = "a red circle (on:1.2) blue\nNegative prompt: green\nSteps: 7, Sampler: Euler, CFG scale: 3.5, Seed: 77, Size: 96x64, "
    text += "Model: strange, Hires upscale: 2, Version: v1.10.1"
    chunks = PngInfo()
    chunks.add_text("parameters", text)
    Image.new("RGB", (96, 64), "white").save(tmp_path / "theirs.png", pnginfo=chunks)
    page = opened()
    tab(page, "Redraw")
    page.locator("#draw-init_image input[type=file]").set_input_files(tmp_path / "theirs.png")
    page.wait_for_function("document.querySelector('#dropped').innerText.includes('A1111')")
    told = page.locator("#dropped").inner_text()
    assert "strange" in told and "Hires" not in told  # which is followed
    tab(page, "Draw")
    value = lambda name: page.locator(f"#draw-{name} :is(input, textarea)").first.input_value()
    found = {
        name: value(name) for name in ("prompt", "negative_prompt", "steps", "cfg_scale", "seed", "width", "height")
    }
    assert found == dict(
        prompt="a red circle (on:1.2) blue", negative_prompt="green", steps="7", cfg_scale="3.5", seed="77", width="96",
        height="64",
    )  # fmt: skip
    assert value("scheduler") == "euler"


def test_a_mask_painted_on_a_picture_changes_it_there_alone(opened, served, tmp_path):
    Image.new("RGB", (64, 64), (20, 60, 200)).save(tmp_path / "blue.png")
    page = opened()
    fill(page, **PICTURE | {"steps": 4}, height=64, prompt="a red circle")
    tab(page, "Redraw")
    page.locator("#draw-init_image input[type=file]").set_input_files(tmp_path / "blue.png")
    page.get_by_role("button", name="paint where it is drawn anew").click()
    canvas = page.locator("#painter canvas")
    page.wait_for_function("document.querySelector('#painter canvas').width === 64")
    box = canvas.bounding_box()
    page.locator("#painter input[type=range]").fill("24")
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.up()
    page.locator("#draw").click()
    ended(page)
    with Image.open(newest(served.outputs)) as image:
        pixels = np.array(image).astype(int)
    assert np.abs(pixels[48:, 48:] - [20, 60, 200]).max() == 0 and np.abs(pixels[8:16, 8:16] - [20, 60, 200]).max() > 20


def test_the_slider_of_compare_shows_both_and_tells_them_apart(opened, served):
    page = opened()
    fill(page, **PICTURE | {"cfg_scale": 7}, prompt="a red circle")
    tab(page, "Compare")
    page.locator("#compare-also textarea").fill("cfg_scale: 1.5")
    page.locator("#compare").click()
    page.wait_for_selector("#pair .pair img.right", timeout=300_000)
    sources = page.locator("#pair .pair img").evaluate_all("ns => ns.map(n => n.src)")
    pictures = [served.outputs / source.rpartition("/")[2] for source in sources]
    assert [read_metadata(path)["config"]["cfg_scale"] for path in pictures] == [7.0, 1.5]
    clip = lambda: page.locator("#pair img.right").evaluate("n => getComputedStyle(n).clipPath")
    page.locator("#pair input[type=range]").fill("100")
    left = clip()
    page.locator("#pair input[type=range]").fill("0")
    assert (left, clip()) == ("inset(0px 0px 0px 100%)", "inset(0px 0px 0px 0%)")
    psnr = float(re.search(r"PSNR ([\d.]+) dB", page.locator("#pair-numbers").inner_text())[1])
    a, b = (np.array(Image.open(path)).astype(float) for path in pictures)
    assert psnr == pytest.approx(10 * np.log10(255**2 / np.square(a - b).mean()), abs=0.06)
    page.wait_for_function(f"document.querySelector('#gallery img')?.src.includes('{pictures[1].name}')")
    page.get_by_role("button", name="compare: right").click()  # the newest, for none was chosen
    page.wait_for_function(f"document.querySelector('#told').innerText.includes('{pictures[1].name}')")
    page.locator("#gallery img").nth(1).click()
    page.wait_for_function(f"document.querySelector('#told').innerText.includes('{pictures[0].name}')")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="compare: left").click()
    page.wait_for_function(f"document.querySelector('#pair img.left')?.src.includes('{pictures[0].name}')")
    assert page.locator("#pair img.right").get_attribute("src").endswith(pictures[1].name)
    page.get_by_role("button", name="its settings").click()
    page.wait_for_function("document.querySelector('#draw-cfg_scale input').value === '7'")
    page.get_by_role("button", name="redraw it").click()
    page.wait_for_function(f"document.querySelector('#draw-init_image img')?.src.includes('{pictures[0].name}')")


def test_two_tabs_wait_for_each_other_and_each_gets_its_picture(opened, served):
    pages = [opened(), opened()]
    before = set(served.outputs.glob("*.png"))
    for page, steps in zip(pages, (60, 1), strict=True):
        fill(page, **PICTURE | {"steps": steps, "width": 128}, prompt=f"a circle {steps}")
    pages[0].locator("#draw").click()
    pages[0].wait_for_selector("#stage progress")
    pages[1].locator("#draw").click()
    assert "in the queue, 1 before it" in pages[1].locator("#stage [data-state=waiting]").inner_text()
    for page in pages:
        ended(page)
    prompts = [read_metadata(path)["config"]["prompt"] for path in set(served.outputs.glob("*.png")) - before]
    assert sorted(prompts) == ["a circle 1", "a circle 60"]


def test_a_training_is_started_watched_found_again_after_a_reload_and_its_students_are_used(opened, served):
    page = opened()
    tab(page, "Distil")
    for name, value in dict(target="IN01", width=128, n_steps=30, batch_size=2, num_samples=2).items():
        page.locator(f"#train-{name} input, #train-{name} textarea").first.fill(str(value))
    page.get_by_role("button", name=re.compile("^data")).click()
    page.locator("#train-sample_steps input").first.fill("2")
    page.locator("#train-start").click()
    page.wait_for_selector("#training [data-state=running]")
    page.reload()  # the browser is lost: the training is not
    page.wait_for_selector("body[data-opened=yes]")
    tab(page, "Distil")
    page.wait_for_selector("#training [data-state=running]")
    page.wait_for_selector("#training [data-state=ended]", timeout=400_000)
    assert page.locator("#training svg polyline").count() >= 2, page.locator("#training").inner_text()
    assert "IN01: relative error" in page.locator("#training").inner_text()
    assert "tensorboard --logdir" in page.locator("#training").inner_text()
    page.locator("#try-it").click()
    page.wait_for_function("document.querySelector('#draw-hyena').innerText.includes('Hyena-00030')")
    fill(page, **PICTURE | {"steps": 1})
    page.locator("#draw").click()
    ended(page)
    assert "IN01:Hyena-00030" in read_metadata(newest(served.outputs))["students"]


def test_last_settings_come_back_and_a_preset_is_saved_and_loaded(opened, served, tmp_path):
    Image.new("RGB", (64, 64), (20, 60, 200)).save(tmp_path / "blue.png")
    page = opened()
    for group in ("presets", "large pictures", "beside: LoRA"):
        page.get_by_role("button", name=group).click()
    fill(page, steps=17, prompt="stripes that stay")  # at once, as by the clipboard: no key is pressed
    choose(page, scheduler="euler")
    choose(page, hyena="landmarks:64:IN01")
    choose(page, lora="gold.safetensors:0.5")
    page.locator("#draw-circular input").check()
    tab(page, "Regions")
    page.locator("#regions").get_by_role("button", name="add a region in the middle").click()
    page.locator("#regions textarea").first.fill("a red circle")
    tab(page, "Redraw")
    choose(page, grow="redraw")
    page.locator("#draw-grow_strength input").first.fill("0.4")
    page.locator("#draw-init_image input[type=file]").set_input_files(tmp_path / "blue.png")
    page.locator("#draw-init_image img").wait_for()
    tab(page, "Draw")
    page.locator("#draw-prompt textarea").press("End")
    page.locator("#draw-prompt textarea").press("Backspace")
    last = served.outputs / ".page" / "last.yaml"
    for _ in range(200):
        if last.exists() and "that sta\n" in last.read_text() and "blue.png" in last.read_text():
            break
        page.wait_for_timeout(50)
    page.locator("#preset-name :is(input, textarea)").first.fill("mine")
    page.get_by_role("button", name="save", exact=True).click()
    preset = served.outputs / ".page" / "presets" / "mine.yaml"
    for _ in range(200):
        if preset.exists():
            break
        page.wait_for_timeout(50)
    assert {"steps: 17", "prompt: stripes that sta", "circular: true", "grow: redraw"} <= set(
        preset.read_text().splitlines()
    )
    page.reload()
    page.wait_for_selector("body[data-opened=yes]")
    for one in (page, opened()):
        value = lambda name, one=one: one.locator(f"#draw-{name} :is(input, textarea)").first.input_value()
        found = {name: value(name) for name in ("prompt", "steps", "scheduler")}
        assert found == {"prompt": "stripes that sta", "steps": "17", "scheduler": "euler"}
        assert "landmarks:64:IN01" in one.locator("#draw-hyena").inner_text()
        for group in ("presets", "large pictures", "beside: LoRA"):
            one.get_by_role("button", name=group).click()
        assert "gold.safetensors:0.5" in one.locator("#draw-lora").inner_text()
        assert one.locator("#draw-circular input").is_checked()
        tab(one, "Regions")
        assert one.locator("#regions textarea").first.input_value() == "a red circle"
        tab(one, "Redraw")
        assert (value("grow"), value("grow_strength")) == ("redraw", "0.4")
        one.locator("#draw-init_image img").wait_for()
    tab(page, "Draw")
    fill(page, steps=3, prompt="something else")
    page.locator("#preset input").fill("mine")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#draw-prompt textarea').value === 'stripes that sta'")
    assert page.locator("#draw-steps input").first.input_value() == "17"


def test_every_field_has_a_name_that_is_read_aloud_and_a_narrow_screen_holds_the_page(opened):
    page = opened(390)
    fill(page, width=100)
    page.locator("#draw").click()
    page.locator("#stage .fault").wait_for()  # in sight, though the form is longer than the screen
    said, act = (page.locator(where).bounding_box() for where in ("#stage .said", "#act"))
    assert said["y"] > 0 and said["y"] + said["height"] <= act["y"] + 1 and act["y"] + act["height"] <= 901
    fill(page, width=64)
    dark = page.evaluate("document.body.classList.contains('dark')")
    page.get_by_role("button", name="dark / light").click()
    page.reload()
    page.wait_for_selector("body[data-opened=yes]")
    assert page.evaluate("document.body.classList.contains('dark')") != dark
    page.get_by_role("button", name="dark / light").click()
    for name in ("Draw", "Regions", "Redraw", "Compare", "Distil"):
        if page.get_by_role("tab", name=name, exact=True).is_visible():
            tab(page, name)
        else:
            page.locator(".overflow-menu button").first.click()
            page.locator(".overflow-dropdown").get_by_text(name, exact=True).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        nameless = page.evaluate(
            """() => [...document.querySelectorAll('input:not([type=file]), textarea, select')].filter(n => n.offsetParent &&
            !(n.getAttribute('aria-label') || n.labels?.length || n.getAttribute('aria-labelledby'))).map(n => n.outerHTML.slice(0, 120))"""
        )
        assert not nameless, name
    page.locator("#recipe input").fill("tiny_sd_all")
    page.keyboard.press("Enter")
    page.locator("#stages li").first.wait_for()
    assert not page.locator("#train-width").is_visible() and page.locator("#train-teacher_model").is_visible()
    page.locator("#recipe input").fill("a single stage, as below")
    page.keyboard.press("Enter")
    page.locator("#train-width").wait_for()


def test_the_named_endpoint_draws_one_json_and_no_file_outside_the_folders(served):
    def call(config):
        body = json.dumps({"data": [config]}).encode()
        asked = urllib.request.Request(
            f"{served.address}gradio_api/call/generate", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{served.address}gradio_api/call/generate/{event}") as answer:
            return answer.read().decode()

    said = call(PICTURE | {"prompt": "by one JSON", "hyena": "landmarks:64:IN01", "steps": 1})
    assert "event: complete" in said
    (path,) = json.loads(said.rpartition("data: ")[2])[0]
    assert read_metadata(path)["config"]["prompt"] == "by one JSON"
    for option, why in (
        ("init_image", "outside the page's folders"),
        ("hyena", "outside the page's folders"),
        ("regions", "damaged"),
    ):
        said = call(PICTURE | {option: "/etc/hostname"})
        assert "event: error" in said and why in said, said
