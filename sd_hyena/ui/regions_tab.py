"""The tab in which rectangles get prompts of their own."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.form import Form
from sd_hyena.ui.region_editor import region_editor, value_of
from sd_hyena.ui.result_panel import ResultPanel
from sd_hyena.ui.session import Session, served

SAVE = """value => {
  const link = document.createElement("a"), controls = {bbox_controls: JSON.parse(value || "[]")};
  link.href = URL.createObjectURL(new Blob([JSON.stringify(controls, null, 2)], {type: "application/json"}));
  link.download = "regions.json";
  link.click();
  URL.revokeObjectURL(link.href);
}"""
FILES = [".json", ".png", ".jpg", ".jpeg", ".webp"]


@dataclass
class RegionsTab:
    """Its components."""

    editor: gr.HTML
    below: gr.Button
    bare: gr.Button
    loaded: gr.UploadButton
    saved: gr.Button
    notice: gr.Markdown

    @classmethod
    def build(cls, session: Session, form: Form) -> RegionsTab:
        gr.Markdown(
            "Drag on the canvas to draw a region, drag it to move it, drag its edge to resize it; Del deletes, arrows move, "
            "Shift with arrows resizes, Enter goes to its prompt."
        )
        with gr.Row():
            loaded = gr.UploadButton("load: JSON or picture", file_types=FILES, size="sm", elem_id="regions-load")
            saved = gr.Button("save as JSON", size="sm", elem_id="regions-save")
            below = gr.Button("picture below", size="sm")
            bare = gr.Button("nothing below", size="sm")
        notice = gr.Markdown("", elem_classes="quiet")
        editor = region_editor(elem_id="regions")
        form.add_in_pairs("draw_background")
        tab = cls(editor, below, bare, loaded, saved, notice)
        return tab

    def wire(self, session: Session, panel: ResultPanel) -> None:
        """With the pictures of the panel."""
        self.loaded.upload(lambda path: read(path, session), [self.loaded], [self.editor, self.notice], **QUICK)
        self.saved.click(None, [self.editor], None, js=SAVE, **QUICK)
        underlay = lambda picture: {self.editor: gr.HTML(src=served(session.album.shown(picture.path)))}
        panel.send(self.below, underlay, [self.editor])
        self.bare.click(lambda: gr.HTML(src=""), None, [self.editor], **QUICK)


def read(path: str, session: Session) -> tuple[Any, str]:
    """The editor with the regions of an uploaded file, laid over it if it is a picture, and what is said of them."""
    from sd_hyena.large.regions import PICTURES, read_regions

    name = Path(path).name
    below = {}
    if Path(path).suffix.lower() in PICTURES:
        with suppress(OSError, ValueError):  # which is said of its regions
            below = {"src": served(session.album.shown(Path(path)))}
    try:
        regions = read_regions(path)
        value, lines = session.regions_of(value_of(regions))
    except BadInput as error:
        said = str(error).replace(path, name)
        return (gr.HTML(**below) if below else gr.skip()), said + "; it lies below now" * bool(below)
    return gr.HTML(value=value, **below), "; ".join([f"{len(regions)} regions of {name}", *lines])
