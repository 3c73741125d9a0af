"""The tab in which two pictures are laid over each other."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import gradio as gr
import yaml

from sd_hyena.errors import BadInput
from sd_hyena.options.command_line import from_dict, to_dict
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.landmarks import Landmarks
from sd_hyena.options.rules import drawn_seed
from sd_hyena.ui.comparison import Comparison, pair_of
from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.fault import fault, line_of
from sd_hyena.ui.job import Picture
from sd_hyena.ui.looking import OFTEN, go_on_looking
from sd_hyena.ui.region_editor import script
from sd_hyena.ui.result_panel import ResultPanel
from sd_hyena.ui.session import Session

NO_STUDENTS = "teacher, no students"


@dataclass
class CompareTab:
    """Its components; `slots` are the pictures that were sent here."""

    session: Session
    left: gr.Dropdown
    right: gr.Dropdown
    also: gr.Textbox
    go: gr.Button
    shown: gr.HTML
    timer: gr.Timer
    job: gr.State
    slots: gr.State

    @classmethod
    def build(cls, session: Session) -> CompareTab:
        gr.Markdown(
            "The settings of Draw, drawn twice from one seed: left and right differ in their students, and in what is "
            "written below. Or send two pictures here that are there already."
        )
        names = cls.names(session)
        with gr.Row():
            given = dict(choices=names, multiselect=True, allow_custom_value=True)
            left = gr.Dropdown(value=[NO_STUDENTS], label="left", elem_id="compare-left", **given)
            right = gr.Dropdown(value=[], label="right", elem_id="compare-right", **given)
        also = gr.Textbox(
            "", label="right also", info="options that differ there, one a line, e.g. steps: 20", lines=2,
            elem_id="compare-also",
        )  # fmt: skip
        go = gr.Button("Compare", variant="primary", elem_id="compare")
        shown = gr.HTML(
            "", js_on_load=script("slider.js"), apply_default_css=False, elem_id="pair", label="both pictures"
        )
        timer = gr.Timer(OFTEN, active=False)  # its own: the panel's ends with the job that the panel follows
        return cls(session, left, right, also, go, shown, timer, gr.State(0), gr.State(["", ""]))

    @staticmethod
    def names(session: Session) -> list[str]:
        return [NO_STUDENTS, *session.folders.choices("students")]

    def wire(
        self, panel: ResultPanel, settings: list[Any], order: Any, fault: Any, faults: gr.HTML, tabs: gr.Tabs
    ) -> None:
        """`order` makes a config of the settings, `settings` are their components; `fault` is for `faults`."""
        self._panel, self._order, self._fault, self._faults = panel, order, fault, faults
        given = {self.left, self.right, self.also, *settings}
        begun = [panel.job, panel.timer, panel.stage, self.job, self.timer, self.shown, faults]
        go_on_looking(self.go.click(self.begin, {*given, self.job}, begun, **QUICK), panel.timer, self.timer)
        self.timer.tick(self.look, [self.job], [self.shown, self.timer, faults], **QUICK)
        for i, button in enumerate((panel.to_left, panel.to_right)):
            put = lambda picture, slots, i=i: self.put(i, picture, slots, tabs)
            panel.send(button, put, [self.slots, self.shown, tabs], self.slots)

    @property
    def settings(self) -> list[Any]:
        """What comes back with the page."""
        return [self.left, self.right, self.also]

    def keep(self, left: list[str] | None, right: list[str] | None, also: str | None, opened: str = "yes") -> None:
        """Remember them, once the page shows the last ones."""
        if opened:
            self.session.remember_tab("compare", dict(left=left or [], right=right or [], also=also or ""))

    def open(self) -> dict[Any, Any]:
        """What a page that is opened shows here."""
        stored, names = self.session.last_of("compare"), self.names(self.session)
        values = {"left": [NO_STUDENTS], "right": [], "also": ""} | stored

        def side(name: str) -> Any:
            given = values[name] if isinstance(values[name], list) else []
            known = [one for one in map(str, given) if one in names or Landmarks.read(one)]
            return gr.update(choices=names, value=known)

        return {self.left: side("left"), self.right: side("right"), self.also: gr.update(value=str(values["also"]))}

    def settle(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Once more what of it the page does not show yet."""
        return {one: update for one, update in self.open().items() if (given[one] or None) != (update["value"] or None)}

    def begin(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Draw both."""
        try:
            base = replace(self._order(given), num_images=1, iteration=1, compare=False, hyena="")
            base = replace(base, seed=drawn_seed(base.seed))
            pair = []
            for side, also in ((self.left, ""), (self.right, given[self.also])):
                names = [name for name in given[side] or () if name != NO_STUDENTS]
                students = self.session.folders.value("hyena", "students", names)
                options = to_dict(base) | {"hyena": students} | (more := _written(also))
                try:
                    pair.append(self.session.checked(to_dict(from_dict(GenerateConfig, options)) | self.session.own))
                except BadInput as error:
                    raise BadInput(f"right also: {error}" if more else str(error)) from None
        except BadInput as error:
            going = self.session.worker.going(given.get(self.job))
            return {self.shown: fault(line_of(error)), self._faults: self._fault(error), self.job: going}
        job = self.session.worker.submit(Comparison(pair=tuple(pair), taken=self.session.take))
        panel = self._panel
        followed = dict(zip((panel.job, panel.timer, panel.stage), panel.follow(job), strict=True))
        begun = {self.job: job.number, self.shown: "<p class='quiet'>drawing both ...</p>", self._faults: "{}"}
        return followed | begun | {self.timer: gr.Timer(active=True)}

    def look(self, number: int) -> list[Any]:
        """Both pictures, once they are there."""
        job = self.session.worker.find(number)
        if job is not None and not job.over.is_set():
            return [gr.skip(), gr.skip(), gr.skip()]
        ended = gr.Timer(active=False)
        if not number:
            return [gr.skip(), ended, gr.skip()]
        if job is not None and job.state == "done":
            return [pair_of(self.session.album, *job.pictures, self.session.state / "small"), ended, gr.skip()]
        line = "ended" if job is None else job.fault or "ended"
        faults = self._fault(BadInput(line)) if job is not None and job.bad_input else gr.skip()
        return [f"<p class='fault'>{escape(line)}</p>", ended, faults]

    def put(self, i: int, picture: Picture, slots: list[str], tabs: gr.Tabs) -> dict[Any, Any]:
        """A picture of the session into the left or the right slot."""
        slots = [str(picture.path) if k == i else path for k, path in enumerate(slots)]
        pictures = [self.session.album.find(path) for path in slots]
        if not all(pictures):
            side, other = ("left", "right") if i == 0 else ("right", "left")
            line = f"<p class='quiet'>{escape(picture.path.name)} is on the {side}; now choose one for the {other}</p>"
            return {self.slots: slots, self.shown: line, self._panel.told: line}
        shown = pair_of(self.session.album, *pictures, self.session.state / "small")
        return {self.slots: slots, self.shown: shown, tabs: gr.Tabs(selected="compare")}


def _written(text: str | None) -> dict[str, Any]:
    """Options as a person writes them. Raises BadInput."""
    try:
        lines = (text or "").replace("=", ": ") if ":" not in (text or "") else text
        options = yaml.safe_load(lines) or {}
    except yaml.YAMLError:
        options = None
    if not isinstance(options, dict):
        raise BadInput("right also: write one option a line, e.g. steps: 20")
    hidden = {"out_dir", "model_dir", "lora_dir", "vae_dir", "embedding_dir", "debug", "name_format"} & options.keys()
    if hidden:
        raise BadInput(f"right also: {', '.join(hidden)} is the command's own to say")
    return json.loads(json.dumps(options, default=str))
