"""The tab in which a picture is described."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.ui.form import Form
from sd_hyena.ui.session import Session

SIZES = {
    "square 512": (512, 512),
    "wide 768x512": (768, 512),
    "portrait 512x768": (512, 768),
    "1K 1024": (1024, 1024),
    "2K 2048": (2048, 2048),
    "2K wide 2048x1152": (2048, 1152),
    "4K 4096": (4096, 4096),
    "4K wide 4096x2304": (4096, 2304),
    "panorama 6144x1024": (6144, 1024),
}
FIRST = ("model", "hyena")
TEXTS = ("prompt", "negative_prompt")
QUICK = dict(queue=False, show_progress="hidden", api_visibility="private")


@dataclass
class DrawTab:
    """Its components beside those of the form."""

    presets: gr.Dropdown
    preset_name: gr.Textbox
    save_preset: gr.Button
    notice: gr.HTML
    sizes: gr.Dropdown
    dice: gr.Button
    recycle: gr.Button
    described: gr.HTML

    @classmethod
    def build(cls, session: Session, form: Form, elsewhere: list[str]) -> DrawTab:
        """`elsewhere` are options that stand in other tabs."""
        with gr.Accordion("presets", open=False):
            with gr.Row():
                presets = gr.Dropdown(list(session.presets()), value=None, label="load a preset", elem_id="preset")
                preset_name = gr.Textbox(label="save these settings as", elem_id="preset-name")
                save_preset = gr.Button("save", size="sm", min_width=80)
            notice = gr.HTML("", elem_id="preset-said", label="what became of the preset")
        form.add_in_pairs(*FIRST)
        described = gr.HTML("", elem_id="described", label="what the students are", apply_default_css=False)
        form.add(*TEXTS)
        with gr.Row():
            form.add("width", "height", min_width=90)
            sizes = gr.Dropdown(list(SIZES), value=None, label="sizes", info="presets", min_width=120)
        with gr.Row():
            form.add("scheduler", "steps", "cfg_scale", min_width=90)
        with gr.Row():
            form.add("seed", "num_images", min_width=90)
            with gr.Column(min_width=90):
                dice = gr.Button("dice", size="sm", elem_id="dice")
                recycle = gr.Button("last seed", size="sm", elem_id="recycle")
        form.add_groups(elsewhere)
        tab = cls(presets, preset_name, save_preset, notice, sizes, dice, recycle, described)
        tab._wire(session, form)
        return tab

    def _wire(self, session: Session, form: Form) -> None:
        parts = form.components
        self.sizes.input(
            lambda name: SIZES.get(name, (gr.skip(), gr.skip())),
            [self.sizes],
            [parts["width"], parts["height"]],
            **QUICK,
        )
        self.dice.click(lambda: -1, None, [parts["seed"]], **QUICK)
        self.recycle.click(lambda: _last_seed(session), None, [parts["seed"]], **QUICK)
        of_students = lambda names: described(session, names)
        parts["hyena"].change(of_students, [parts["hyena"]], [self.described], trigger_mode="multiple", **QUICK)


def _last_seed(session: Session) -> Any:
    pictures = session.album.pictures
    return pictures[0].config.seed if pictures else gr.skip()


def described(session: Session, names: list[str] | None) -> str:
    """What `describe` says of each of these students."""
    from sd_hyena.options.landmarks import Landmarks
    from sd_hyena.students.checkpoint import describe, load_students

    parts = []
    for name in names or ():
        try:
            path = session.folders.value("hyena", "students", [name])
            text = "seen through landmarks of the picture's own, without training"
            text = text if Landmarks.read(path) else describe(load_students(path))
        except BadInput as error:
            text = str(error)
        parts.append(
            f"<details><summary>{escape(name)}: {escape(text.splitlines()[0])}</summary><pre class='log'>{escape(text)}</pre></details>"
        )
    return "".join(parts)
