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
from sd_hyena.options.rules import drawn_seed
from sd_hyena.ui.comparison import Comparison, pair_of
from sd_hyena.ui.draw_tab import QUICK
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
        return cls(session, left, right, also, go, shown, gr.State(0), gr.State(["", ""]))

    @staticmethod
    def names(session: Session) -> list[str]:
        return [NO_STUDENTS, *session.folders.choices("students")]

    def wire(
        self, panel: ResultPanel, settings: list[Any], order: Any, fault: Any, faults: gr.HTML, tabs: gr.Tabs
    ) -> None:
        """`order` makes a config of the settings, `settings` are their components; `fault` is for `faults`."""
        self._panel, self._order, self._fault, self._faults = panel, order, fault, faults
        given = {self.left, self.right, self.also, *settings}
        begun = [panel.job, panel.timer, panel.stage, self.job, self.shown, faults]
        self.go.click(self.begin, given, begun, **QUICK)
        panel.timer.tick(self.look, [self.job], [self.shown, self.job], **QUICK)
        for i, button in enumerate((panel.to_left, panel.to_right)):
            put = lambda chosen, slots, i=i: self.put(i, chosen, slots)
            button.click(put, [panel.chosen, self.slots], [self.slots, self.shown, tabs], **QUICK)

    def begin(self, given: dict[Any, Any]) -> dict[Any, Any]:
        """Draw both."""
        try:
            base = replace(self._order(given), num_images=1, iteration=1, compare=False, hyena="")
            base = replace(base, seed=drawn_seed(base.seed))
            pair = []
            for side, also in ((self.left, ""), (self.right, given[self.also])):
                names = [name for name in given[side] or () if name != NO_STUDENTS]
                students = self.session.folders.value("hyena", "students", names)
                options = to_dict(base) | {"hyena": students} | _written(also)
                pair.append(self.session.checked(to_dict(from_dict(GenerateConfig, options)) | self.session.own))
        except BadInput as error:
            line = escape(" ".join(str(error).split()))
            return {self.shown: f"<p class='fault' role='alert'>{line}</p>", self._faults: self._fault(error)}
        job = self.session.worker.submit(Comparison(pair=tuple(pair), taken=self.session.take))
        panel = self._panel
        followed = dict(zip((panel.job, panel.timer, panel.stage), panel.follow(job), strict=True))
        begun = {self.job: job.number, self.shown: "<p class='quiet'>drawing both ...</p>", self._faults: "{}"}
        return followed | begun

    def look(self, number: int) -> list[Any]:
        """Both pictures, once they are there."""
        job = self.session.worker.find(number)
        if job is None or not job.over.is_set():
            return [gr.skip(), gr.skip()]
        if job.state == "done":
            return [pair_of(self.session.album, *job.pictures, self.session.state / "small"), 0]
        return [f"<p class='fault'>{escape(job.fault or 'ended')}</p>", 0]

    def put(self, i: int, chosen: str, slots: list[str]) -> list[Any]:
        """A picture of the session into the left or the right slot."""
        if not chosen:
            return [gr.skip(), gr.skip(), gr.skip()]
        slots = [chosen if k == i else path for k, path in enumerate(slots)]
        pictures = [self.session.album.find(path) for path in slots]
        if not all(pictures):
            side = "right" if i == 0 else "left"
            return [slots, f"<p class='quiet'>now choose another picture for the {side}</p>", gr.skip()]
        shown = pair_of(self.session.album, *pictures, self.session.state / "small")
        return [slots, shown, gr.Tabs(selected="compare")]


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
    return json.loads(json.dumps(options))
