"""The side of the page that is always there: draw, cancel, what is being drawn, and the pictures of the session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.ui.draw_tab import QUICK
from sd_hyena.ui.fault import fault, line_of
from sd_hyena.ui.job import Job, Picture
from sd_hyena.ui.looking import OFTEN
from sd_hyena.ui.session import Session, served
from sd_hyena.ui.stage import IDLE, stage


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
            interactive=False, preview=False, buttons=["fullscreen"],  # its download is that of the small copy
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
        return cls(session=session, **made, **state, **dict(zip(names, sends, strict=True)))

    @property
    def followed(self) -> list[Any]:
        """The outputs of `look`."""
        return [self.stage, self.gallery, self.seen, self.timer, self._faults]

    def look(self, number: int, seen: int) -> list[Any]:
        """How the job is that this page follows."""
        job = self.session.worker.find(number)
        over = job is None or job.over.is_set()  # asked before what is shown is made: that is then the last of it
        shown = stage(job, self.session.worker.before(job), self._picture_of(job)) if job else gr.skip()
        faults = self._fault(BadInput(job.fault)) if job and over and job.bad_input else gr.skip()
        return [shown, *self.pictures(seen), gr.Timer(active=False) if over else gr.skip(), faults]

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

    def wire(self, fault: Callable[[BadInput], str], faults: gr.HTML) -> None:
        """`fault` is for `faults`."""
        self._fault, self._faults = fault, faults
        self.timer.tick(self.look, [self.job, self.seen], self.followed, **QUICK)
        self.cancel.click(self._cancel, [self.job], None, **QUICK)
        self.gallery.select(self._choose, None, [self.chosen, self.told], **QUICK)

    def picture(self, chosen: str) -> Picture:
        """The chosen one, the newest if none is. Raises BadInput."""
        picture = self.session.album.find(chosen) if chosen else next(iter(self.session.album.pictures), None)
        if picture is None:
            raise BadInput("this picture is no longer there; choose another" if chosen else "there is no picture yet")
        return picture

    def send(self, button: gr.Button, act: Callable[..., dict[Any, Any]], outputs: list[Any], *more: Any) -> None:
        """Have a button `act(picture, *more)` on the chosen picture, and say on which, or why it does not."""
        doing = lambda chosen, *values: self.sent(act, chosen, *values)
        button.click(doing, [self.chosen, *more], [self.told, *outputs], **QUICK)

    def sent(self, act: Callable[..., dict[Any, Any]], chosen: str, *values: Any) -> dict[Any, Any]:
        """What `act` answers."""
        try:
            picture = self.picture(chosen)
            return {self.told: told(picture)} | act(picture, *values)
        except BadInput as error:
            return {self.told: fault(line_of(error))}

    def _cancel(self, number: int) -> None:
        if job := self.session.worker.find(number) or self.session.worker.newest():
            job.cancel()

    def _choose(self, event: gr.SelectData) -> tuple[str, str]:
        return self.choose(event.value)

    def choose(self, entry: Any) -> tuple[str, str]:
        """The picture of an entry of a gallery, whose places are those of when it was shown: by its name."""
        name = entry.get("caption") if isinstance(entry, dict) else None
        picture = self.session.album.find(name)
        return (str(picture.path), told(picture)) if picture else ("", "")


def told(picture: Picture) -> str:
    """What a picture is, with a way to its file."""
    config, name = picture.config, escape(picture.path.name)
    students = escape(config.hyena.rpartition("/")[2] or "none")
    facts = f"{config.width}x{config.height}, {config.scheduler}, {config.steps} steps, seed {config.seed}"
    return (
        f"<p class='quiet'><a href='{escape(served(picture.path), True)}' target='_blank'>{name}</a>, the file itself "
        f"with all that it says · {facts}, students {students}, {picture.seconds:.1f} s</p>"
    )
