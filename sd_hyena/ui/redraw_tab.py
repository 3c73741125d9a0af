"""The tab for a picture to start from: drawn anew, a part of it, or grown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.form import Form
from sd_hyena.ui.region_editor import HOST, script
from sd_hyena.ui.session import Session, served

FIRST = ("init_image", "strength", "noise_inversion", "upscaler", "scale", "grow", "controlnet", "control_image")


@dataclass
class RedrawTab:
    """Its components beside those of the form."""

    painter: gr.HTML
    notice: gr.HTML
    names: list[str]

    @classmethod
    def options(cls, form: Form) -> list[str]:
        """Those that stand here: what starts from a picture, and what has no effect without."""
        return form.needing(*FIRST)

    @classmethod
    def build(cls, session: Session, form: Form) -> RedrawTab:
        names = cls.options(form)
        hint = [name for name in form.needing("controlnet", "control_image") if name in names]
        gr.Markdown("Drop a picture. What it was drawn with fills the form; then change what you like and draw.")
        form.add("init_image", label="picture to start from")
        notice = gr.HTML("", elem_id="dropped")
        form.add_in_pairs(*(name for name in names if name not in hint))
        with gr.Accordion("paint where it is drawn anew", open=False) as folded:
            parts = dict(html_template=HOST, css_template=script("painter.css"), js_on_load=script("painter.js"))
            painter = gr.HTML("", **parts, src="", label="mask", apply_default_css=False, elem_id="painter")
        with gr.Accordion("ControlNet", open=False):
            form.add_in_pairs(*hint)
        tab = cls(painter, notice, names)
        parts = form.components
        parts["init_image"].change(_paper, [parts["init_image"]], [painter], trigger_mode="multiple", **QUICK)
        folded.expand(_picture, [parts["init_image"]], [painter], **QUICK)  # what comes while it unfolds is lost
        return tab


def _paper(path: str | None) -> gr.HTML:
    """The painter with a picture to paint on."""
    return gr.HTML(value="", src=_address(path))


def _picture(path: str | None) -> gr.HTML:
    """The same picture once more, and what is painted on it stays."""
    return gr.HTML(src=_address(path))


def _address(path: str | None) -> str:
    return served(Path(path)) if path else ""
