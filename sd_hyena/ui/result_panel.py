"""The side of the page that is always there: draw, cancel, what is being drawn, and the pictures of the session."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sd_hyena.ui.job import Job, Picture
from sd_hyena.ui.session import Session, served
from sd_hyena.ui.stage import IDLE, stage

OFTEN = 0.4  # seconds between two looks at a job
ENDED = ("done", "ended", "failed")


@dataclass
class ResultPanel:
    """Its components; `job` is the number of the job that this page follows, `seen` how many pictures it has shown."""

    session: Session
    draw: gr.Button
    cancel: gr.Button
    forecast: gr.HTML
    stage: gr.HTML
    timer: gr.Timer
    job: gr.State
    seen: gr.State
    gallery: gr.Gallery
    chosen: gr.State
    told: gr.HTML
    to_redraw: gr.Button
    to_form: gr.Button
    to_regions: gr.Button
    to_left: gr.Button
    to_right: gr.Button

    @classmethod
    def build(cls, session: Session) -> ResultPanel:
        with gr.Row(elem_id="act"):
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
        forecast = gr.HTML("", elem_id="forecast", elem_classes="quiet", label="what it will do")
        box = gr.HTML(IDLE, elem_id="stage", label="what is being drawn")
        gallery = gr.Gallery(
            label="pictures of this session", columns=3, height=320, object_fit="contain", elem_id="gallery",
            interactive=False, preview=False, buttons=["download", "fullscreen"],
        )  # fmt: skip
        told = gr.HTML("", elem_id="told")
        with gr.Row():
            sends = [
                gr.Button(text, size="sm", min_width=90)
                for text in ("redraw it", "its settings", "its regions", "compare: left", "compare: right")
            ]
        state = dict(timer=gr.Timer(OFTEN, active=False), job=gr.State(0), seen=gr.State(-1), chosen=gr.State(""))
        names = ("to_redraw", "to_form", "to_regions", "to_left", "to_right")
        made = dict(draw=draw, cancel=cancel, forecast=forecast, stage=box, gallery=gallery, told=told)
        panel = cls(session=session, **made, **state, **dict(zip(names, sends, strict=True)))
        panel._wire()
        return panel

    @property
    def followed(self) -> list[Any]:
        """The outputs of `look`."""
        return [self.stage, self.gallery, self.seen, self.timer]

    def look(self, number: int, seen: int) -> list[Any]:
        """How the job is that this page follows."""
        job = self.session.worker.find(number)
        going = job is not None and job.state not in ENDED
        shown = stage(job, self.session.worker.before(job), self._picture_of(job)) if job else gr.skip()
        return [shown, *self.pictures(seen), gr.skip() if going else gr.Timer(active=False)]

    def pictures(self, seen: int) -> list[Any]:
        """The gallery, if it has changed, and how many pictures it then has shown."""
        album = self.session.album
        if seen == album.count:
            return [gr.skip(), gr.skip()]
        return [[(str(album.shown(one.path)), one.path.name) for one in album.pictures], album.count]

    def follow(self, job: Job) -> list[Any]:
        """For `job`, `timer` and `stage`, once a job was begun."""
        return [job.number, gr.Timer(active=True), stage(job, self.session.worker.before(job))]

    def _picture_of(self, job: Job | None) -> str:
        pictures = getattr(job, "pictures", ())
        return served(self.session.album.shown(pictures[-1].path)) if pictures and pictures[-1].path.is_file() else ""

    def _wire(self) -> None:
        quick = dict(queue=False, show_progress="hidden", api_visibility="private")
        self.timer.tick(self.look, [self.job, self.seen], self.followed, **quick)
        self.cancel.click(self._cancel, [self.job], None, **quick)
        self.gallery.select(self._choose, None, [self.chosen, self.told], **quick)

    def _cancel(self, number: int) -> None:
        if job := self.session.worker.find(number) or self.session.worker.newest():
            job.cancel()

    def _choose(self, event: gr.SelectData) -> tuple[str, str]:
        pictures = self.session.album.pictures
        if not isinstance(event.index, int) or event.index >= len(pictures):
            return "", ""
        picture = pictures[event.index]
        return str(picture.path), told(picture)


def told(picture: Picture) -> str:
    """What a picture is, with a way to its file."""
    config, name = picture.config, escape(picture.path.name)
    students = escape(config.hyena.rpartition("/")[2] or "none")
    facts = f"{config.width}x{config.height}, {config.scheduler}, {config.steps} steps, seed {config.seed}"
    return (
        f"<p class='quiet'><a href='{escape(served(picture.path), True)}' target='_blank'>{name}</a> · {facts}, "
        f"students {students}, {picture.seconds:.1f} s</p>"
    )
