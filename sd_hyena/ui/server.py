"""The page as a whole: its tabs put together, and served."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import threading
import time
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.files.names import writable_folder
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.own_defaults import own_defaults
from sd_hyena.processes.ranks import say
from sd_hyena.ui.compare_tab import CompareTab
from sd_hyena.ui.distil_tab import DistilTab
from sd_hyena.ui.draw_tab import QUICK, DrawTab
from sd_hyena.ui.dropped import dropped
from sd_hyena.ui.fault import fault, line_of
from sd_hyena.ui.folders import SEPARATORS, kind_of
from sd_hyena.ui.form import Form
from sd_hyena.ui.job import Picture
from sd_hyena.ui.looking import go_on_looking
from sd_hyena.ui.page_config import PageConfig
from sd_hyena.ui.redraw_tab import RedrawTab
from sd_hyena.ui.region_editor import script, value_of
from sd_hyena.ui.regions_tab import RegionsTab
from sd_hyena.ui.replaced import forget_replaced
from sd_hyena.ui.result_panel import ResultPanel, told
from sd_hyena.ui.session import HIDDEN, Session
from sd_hyena.ui.stage import refused

TITLE = "sd_hyena"
DARK = "() => { localStorage.setItem('sd_hyena dark', document.body.classList.toggle('dark') ? 'yes' : 'no'); }"
SHADED = "() => { const dark = localStorage.getItem('sd_hyena dark'); if (dark) document.body.classList.toggle('dark', dark === 'yes'); }"
OPENED = "() => { document.body.dataset.opened = 'yes'; }"  # what is typed from here on stays
IF_OPENED = "(...values) => [...values.slice(0, -1), document.body.dataset.opened || '']"
ELSEWHERE = {
    "regions": "regions",
    "mask": "painter",
    "preset": "preset-name",
    "right": "compare-also",
}  # what has no field of the form
TABS = 8  # open pages whose state is kept: each costs a copy of all components' configuration
TIDIED = 20  # seconds between looks for what events leave behind in cycles, which Python by itself looks for too seldom
SWEPT = 3600  # seconds between looks for files that are so old that they go


class Page:
    """The components of the page and what happens between its tabs."""

    def __init__(self, session: Session):
        self.session = session
        self.form = Form(GenerateConfig, session.folders, "draw", HIDDEN)
        self._looked: tuple[Any, Any] = None, None  # settings, and what was found of them
        self._looking = threading.Lock()
        # no delete_cache: it deletes every upload, those of the last settings too, when the page's command ends
        with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as self.blocks:
            self._build()
            self._wire()

    def _build(self) -> None:
        session, form = self.session, self.form
        elsewhere = [*RedrawTab.options(form), "draw_background"]
        self.faults = gr.HTML("{}", html_template="", js_on_load=script("faults.js"), elem_id="faults")
        with gr.Row():
            gr.Markdown(f"## {TITLE}", elem_id="title")
            self.dark = gr.Button("dark / light", size="sm", scale=0, min_width=110)
        with gr.Row():
            with gr.Column(scale=3, min_width=320), gr.Tabs(elem_id="tabs") as self.tabs:
                with gr.Tab("Draw", id="draw"):
                    self.draw = DrawTab.build(session, form, elsewhere)
                with gr.Tab("Regions", id="regions", render_children=True):
                    self.regions = RegionsTab.build(session, form)
                with gr.Tab("Redraw", id="redraw", render_children=True):
                    self.redraw = RedrawTab.build(session, form)
                with gr.Tab("Compare", id="compare", render_children=True):
                    self.compare = CompareTab.build(session)
                with gr.Tab("Distil", id="distil", render_children=True):
                    self.distil = DistilTab.build(session, self.faults)
            with gr.Column(scale=2, min_width=300, elem_id="panel"):
                self.panel = ResultPanel.build(session)
        self.opened = gr.Textbox("", visible=False)  # of what is built the last: the last value of IF_OPENED

    @property
    def settings(self) -> list[Any]:
        """All components that say what is drawn."""
        return [*self.form.components.values(), self.regions.editor, self.redraw.painter]

    def _wire(self) -> None:
        panel, form = self.panel, self.form
        self.dark.click(None, None, None, js=DARK, **QUICK)
        self.blocks.load(None, None, None, js=SHADED, **QUICK)
        panel.wire(self.fault, self.faults)
        self.regions.wire(self.session, panel)
        self.compare.wire(panel, self.settings, self.order, self.fault, self.faults, self.tabs)
        begun = [panel.job, panel.timer, panel.stage, self.faults]
        go_on_looking(panel.draw.click(self.begin, {*self.settings, panel.job}, begun, **QUICK), panel.timer)
        shown = [*form.components.values(), self.regions.editor]
        gr.api(self.generate, api_name="generate", concurrency_limit=None)
        seen = [panel.gallery, panel.seen, self.draw.presets]
        distil = [*self.distil.settings, self.distil.stages, self.distil.single]
        kept = [*shown, *self.compare.settings, *distil]
        every = {*self.settings, *self.compare.settings, *self.distil.settings}
        opened = self.blocks.load(self.open, None, [*kept, *begun[:3], *seen], **QUICK)
        opened = opened.then(self.settle, every, kept, **QUICK)
        opened = opened.then(None, None, None, js=OPENED, **QUICK)
        settings = {*self.settings, self.opened}
        told = dict(js=IF_OPENED, **QUICK)
        consequences = [self.faults, self.regions.editor, *form.left_open()]
        opened.then(self.look, settings, consequences, **told).then(self.foretell, settings, [panel.forecast], **told)
        filled = [*shown, self.redraw.painter]
        form.components["init_image"].upload(
            self.take, [form.components["init_image"]], [*filled, self.redraw.notice], **QUICK
        )
        panel.send(panel.to_form, self.repeat, [*filled, self.tabs])
        panel.send(panel.to_regions, self.take_regions, [self.regions.editor, self.tabs])
        panel.send(panel.to_redraw, self.start_from, [form.components["init_image"], self.tabs])
        self.draw.presets.input(self.load_preset, [self.draw.presets], [*filled, self.draw.notice], **QUICK)
        saved = [self.draw.presets, self.draw.notice, self.faults]
        named = {self.draw.preset_name, *self.settings}
        self.draw.save_preset.click(self.save_preset, named, saved, **QUICK)
        self.blocks.load(self.distil.follow_newest, None, self.distil.followed, **QUICK)
        parts = form.components
        tried = [parts["hyena"], parts["model"], self.tabs, self.distil.answer]
        self.distil.try_it.click(self.try_it, [self.distil.runs], tried, **QUICK)
        changes = [one.change for one in self.settings]  # `input` of a text box tells nothing of what is pasted
        latest = dict(trigger_mode="always_last", **told)
        compared = [one.change for one in self.compare.settings]
        gr.on(compared, self.compare.keep, [*self.compare.settings, self.opened], None, **latest)
        distilled = {*self.distil.settings, self.opened}
        gr.on([one.change for one in self.distil.settings], self.keep_distil, distilled, None, **latest)
        changed = gr.on(changes, self.look, settings, consequences, **latest)
        changed.then(self.foretell, settings, [panel.forecast], **latest)

    def generate(self, config: dict) -> list[str]:
        """Draw what a config says, as one JSON: options by name, files by the names that the page shows, regions as
        {"bbox_controls": [...]}. Returns the files of the pictures."""
        try:
            job = self.session.draw(self._asked(config), "drawing by API")
        except BadInput as error:
            raise gr.Error(line_of(error), print_exception=False) from None
        job.over.wait()
        if job.state != "done":
            raise gr.Error(job.fault or "ended before it was done", print_exception=False)
        return [str(path) for path in job.result]

    def _asked(self, config: dict[str, Any]) -> GenerateConfig:
        if not isinstance(config, dict):
            raise BadInput("config must be one JSON object of options")
        options, regions = dict(config), config.get("regions")
        if isinstance(regions, dict):
            regions = json.dumps(regions.get("bbox_controls"))
            del options["regions"]
        for name, value in options.items():
            field = self.form.fields.get(name)
            kind = kind_of(field) if field else ""
            if kind not in ("", "upload") and isinstance(value, str):
                entries = value.split(SEPARATORS[kind]) if kind in SEPARATORS else value
                with suppress(BadInput):  # a path, then, which is looked at below
                    options[name] = self.session.folders.value(name, kind, entries)
        return self.session.order(options, regions if isinstance(regions, str) else "")

    def order(self, given: dict[Any, Any]) -> GenerateConfig:
        """What the page's settings ask for. Raises BadInput."""
        options = self.form.values(given)
        return self.session.order(options, given[self.regions.editor], given[self.redraw.painter])

    def looked_at(self, given: dict[Any, Any]) -> GenerateConfig:
        """The same for who only looks: several ask about one change, the first one's answer is theirs too. Raises BadInput."""
        asked = {component._id: given[component] for component in self.settings}
        with self._looking:
            if self._looked[0] != asked:
                try:
                    self._looked = asked, self.order(given)
                except BadInput as error:
                    self._looked = asked, error
            found = self._looked[1]
        if isinstance(found, BadInput):
            raise found
        return found

    def begin(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Draw; or say, at its field, what is wrong."""
        panel = self.panel
        self.remember(given)
        try:
            config = self.order(given)
        except BadInput as error:
            going = self.session.worker.going(given.get(panel.job))
            return {self.faults: self.fault(error), panel.stage: refused(line_of(error)), panel.job: going}
        followed = panel.follow(self.session.draw(config))
        return dict(zip((panel.job, panel.timer, panel.stage, self.faults), [*followed, "{}"], strict=True))

    def look(self, given: dict[Any, Any]) -> Any:
        """What changes on the page with the settings, its forecast apart.

        All at once: gradio repeats whatever listens to an event when the last call of one of its listeners was put off, so
        that two which are put off (`always_last`, as any `change` is if not told) call each other for ever.
        """
        if not given[self.opened]:
            return gr.skip()
        seen = {self.faults: self.check(given), **self.measure(given)}
        with suppress(BadInput):
            seen |= self.form.own(self.form.value("model", given))
        return seen

    def measure(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """The canvas of the regions at the size of the picture."""
        try:
            config = self.session.order(self.form.values(given), "[]")
        except BadInput:
            return {}
        return {self.regions.editor: gr.HTML(width=config.width, height=config.height)}

    def check(self, given: dict[Any, Any]) -> Any:
        """What is wrong with the settings, at its field; right or wrong they are remembered, once the page shows the last ones."""
        if not given[self.opened]:
            return gr.skip()
        self.remember(given)
        try:
            self.looked_at(given)
        except BadInput as error:
            return self.fault(error)
        return "{}"

    def remember(self, given: dict[Any, Any]) -> None:
        """All that can be read of the settings."""
        self.session.remember(self.form.legible(given), given[self.regions.editor])

    def keep_distil(self, given: dict[Any, Any]) -> None:
        """Likewise of a training, once the page shows the last ones."""
        if given[self.opened]:
            self.distil.keep(given)

    def foretell(self, given: dict[Any, Any]) -> Any:
        """What the settings would do and cost, once there is what counts it."""
        if not given[self.opened]:
            return gr.skip()
        self.session.worker.ready.wait()
        from sd_hyena.generate.forecast import forecast

        try:
            config = self.looked_at(given)
            return escape(forecast(config).line(self.session.rate(config)))
        except BadInput:
            return ""

    def try_it(self, name: str | None) -> Any:
        """The newest students of a training, in Draw."""
        parts = self.form.components
        try:
            students, model = self.distil.newest(name)
        except BadInput as error:
            return {self.distil.answer: fault(line_of(error))}
        updates = self.form.with_choices()
        return {
            parts["hyena"]: updates[parts["hyena"]] | {"value": [students]},
            parts["model"]: updates[parts["model"]] | {"value": model},
            self.tabs: gr.Tabs(selected="draw"),
            self.distil.answer: "",
        }

    def fault(self, error: BadInput) -> str:
        """For the component that puts it at its field."""
        line = line_of(error)
        if region := re.match(r"regions, region (\d+)", line):
            place = f"region-{region[1]}"
        elif not (place := ELSEWHERE.get(re.split(r"\W", line, maxsplit=1)[0], "")):
            name = self.form.faulty(line)
            place = self.form.element(name) if name else ""
        return json.dumps({place: line} if place else {})

    def open(self) -> dict[Any, Any]:
        """What a page that is opened shows: last time's settings, the pictures, and what is being drawn."""
        panel, (options, regions) = self.panel, self.session.last()
        told, _ = self.form.shown({"device": self.session.config.device} | options, self.session.uploads)
        updates = self.form.with_choices() | told
        loras = json.dumps([Path(name).stem for name in self.session.folders.choices("loras")])
        updates[self.regions.editor] = gr.HTML(value=regions, loras=loras, **_size(options))
        for component, update in self.form.own(options.get("model", "")).items():
            updates[component] = updates.get(component, {}) | update
        gallery, seen = panel.pictures(-1)
        presets = gr.Dropdown(choices=list(self.session.presets()))
        updates |= {panel.gallery: gallery, panel.seen: seen, self.draw.presets: presets}
        if job := self.session.worker.newest():
            updates |= dict(zip((panel.job, panel.timer, panel.stage), panel.follow(job), strict=True))
        return updates | self.compare.open() | self.distil.open()

    def settle(self, given: dict[Any, Any]) -> Any:
        """Once more what a page that is opened does not show yet: a value that comes while its tab is being built is lost."""
        options, regions = self.session.last()
        values = {}
        for name, value in options.items():
            with suppress(BadInput, KeyError):
                if self.form.value(name, given) != value:
                    values[name] = value
        updates, _ = self.form.shown(values, self.session.uploads)
        if given[self.regions.editor] != regions:
            updates[self.regions.editor] = _editor(regions, _size(options))
        updates |= self.compare.settle(given) | self.distil.settle(given)
        return updates or gr.skip()

    def take(self, path: str | None) -> dict[Any, Any]:
        """Set the form to what a picture to start from was drawn with."""
        if not path or not Path(path).is_file():
            return {self.redraw.notice: ""}
        updates, line, left = self._taken(path, starting=True)
        return updates | {self.redraw.notice: _notice(line, left)}

    def repeat(self, picture: Picture) -> dict[Any, Any]:
        """Set the form to what a picture of the session was drawn with."""
        updates, line, left = self._taken(str(picture.path), starting=False)
        said = told(picture) + _notice(line, left)
        return updates | {self.panel.told: said, self.tabs: gr.Tabs(selected="draw")}

    def _taken(self, path: str, starting: bool) -> tuple[dict[Any, Any], str, list[str]]:
        """Updates that show what a picture says, what is said of it, and what was not taken."""
        found = dropped(path, self.session, starting)
        if found is None:
            return {}, "This picture does not say what it was drawn with.", []
        updates, lost = self.form.shown(found.options, self.session.uploads)
        if found.regions is not None:
            updates |= {
                self.regions.editor: _editor(found.regions, found.options),
                self.redraw.painter: gr.HTML(value=""),
            }
        what = f"filled in from a picture of {found.program}" if found.program else "not read"
        return updates, what, [*found.left, *lost]

    def take_regions(self, picture: Picture) -> dict[Any, Any]:
        """The regions of the chosen picture. Raises BadInput for one that has none."""
        found = dropped(str(picture.path), self.session)
        if found is None or found.regions in (None, "[]"):
            raise BadInput(f"{picture.path.name} has no regions; those of the editor stay")
        return {self.regions.editor: _editor(found.regions, found.options), self.tabs: gr.Tabs(selected="regions")}

    def start_from(self, picture: Picture) -> dict[Any, Any]:
        """The chosen picture as the one to start from."""
        copy = self.session.uploads / picture.path.name
        shutil.copyfile(picture.path, copy)
        return {self.form.components["init_image"]: str(copy), self.tabs: gr.Tabs(selected="redraw")}

    def load_preset(self, name: str) -> dict[Any, Any]:
        """Set the form to a preset, what it does not say to its default; a picture stays if the preset tells how to start
        from one, and names none."""
        try:
            options = self.session.preset(name)
        except BadInput as error:
            return {self.draw.notice: fault(line_of(error))}
        needed = {self.form.fields[one].metadata["needs"] for one in options if one in self.form.fields}
        stay = [one for one in self.form.uploads() if one in needed and one not in options]
        whole = self.form.defaults() | {"device": self.session.config.device} | options
        whole = {one: value for one, value in whole.items() if one not in stay}
        updates, lost = self.form.shown(whole, self.session.uploads)
        regions = "[]"
        if options.get("regions"):
            from sd_hyena.large.regions import read_regions
            from sd_hyena.options.shipped import shipped_file

            try:
                regions, lines = self.session.regions_of(value_of(read_regions(shipped_file(options["regions"]))))
                lost += lines
            except BadInput as error:
                lost.append(str(error))
        updates[self.regions.editor] = _editor(regions, options)
        if "init_image" not in stay:
            updates[self.redraw.painter] = gr.HTML(value="")
        lost += ["mask: a painted one is not kept; paint it anew"] * bool(options.get("mask"))
        return updates | {self.draw.notice: _notice(f"preset {name}", lost)}

    def save_preset(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Save the settings under a name."""
        try:
            path = self.session.save_preset(given[self.draw.preset_name], self.order(given))
        except BadInput as error:
            return {self.draw.notice: fault(line_of(error)), self.faults: self.fault(error)}
        presets = gr.Dropdown(choices=list(self.session.presets()))
        return {self.draw.presets: presets, self.draw.notice: _notice(f"saved as {path.name}", [])}


def _size(options: dict[str, Any]) -> dict[str, int]:
    """Of the canvas, as far as the options tell."""
    with suppress(BadInput):
        own = own_defaults(options.get("model", ""))
        width = options.get("width") or own.width
        return {"width": width, "height": options.get("height") or options.get("width") or own.height}
    return {}


def _editor(regions: str, options: dict[str, Any]) -> Any:
    """The editor with these regions on a canvas of these options' size, if they say one."""
    size = {}
    if options.get("width"):
        size = dict(width=options["width"], height=options.get("height") or options["width"])
    return gr.HTML(value=regions, **size)


def _notice(line: str, left: list[str]) -> str:
    items = "".join(f"<li>{escape(one)}</li>" for one in left)
    return f"<p class='quiet'>{escape(line)}</p>" + (f"<p class='quiet'>not taken:</p><ul>{items}</ul>" if left else "")


def launched(session: Session) -> tuple[Page, str]:
    """The page, served; and where. Raises BadInput for a port that is taken."""
    config = session.config
    gr.set_static_paths([os.path.abspath(config.out_dir), os.path.abspath(session.state)])
    page = Page(session)
    port = config.port or _free_port(config.address)
    try:
        _, address, _ = page.blocks.launch(
            server_name=config.address, server_port=port, auth=config.credentials, share=False, quiet=True,
            prevent_thread_lock=True, run_history=False, footer_links=[], mcp_server=False, enable_monitoring=False,
            max_file_size=f"{config.max_upload}mb", theme=_theme(), css=script("page.css"), pwa=False,
            ssr_mode=False, show_error=True, state_session_capacity=TABS,
        )  # fmt: skip
    except OSError as error:
        raise BadInput(f"port={config.port} cannot be used ({error}); give another one with --port") from None
    return page, address


def serve(config: PageConfig) -> None:
    """Until a signal ends the command."""
    for name in ("out_dir", "state_dir"):
        writable_folder(getattr(config, name), name)
    session = Session(config)
    session.tidy()
    try:
        page, address = launched(session)
        session.worker.start()  # what it imports would keep the page waiting
        say(f"the page is at {address}")
        try:
            session.worker.ready.wait()
            gc.freeze()  # what is there stays, and need not be looked at
            swept = time.monotonic()
            while True:
                time.sleep(TIDIED)
                forget_replaced(page.blocks)
                gc.collect()
                if time.monotonic() - swept > SWEPT:
                    swept = time.monotonic()
                    session.tidy()
        finally:
            page.blocks.close(verbose=False)
    finally:
        session.close()


def _theme() -> gr.themes.Base:
    """The plain one, with small print that can be read."""
    return gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100",
    )  # fmt: skip


def _free_port(address: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]
