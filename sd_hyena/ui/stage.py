"""What a page shows of a job while it is done: a preview, how far it is, what it said."""

from __future__ import annotations

from html import escape

from sd_hyena.processes.progress import Work
from sd_hyena.ui.fault import fault
from sd_hyena.ui.job import Job

IDLE = "<div class='stage-box'><div class='frame'><span class='quiet'>nothing drawn yet</span></div></div>"


def stage(job: Job | None, before: int = 0, picture: str = "") -> str:
    """As HTML. `picture` is the address of the newest picture, shown where there is no preview."""
    if job is None:
        return IDLE
    source = job.preview or picture
    shown = f"<img src='{escape(source, True)}' alt='{'preview' if job.preview else 'picture'}'>" if source else ""
    lines = []
    if job.state == "at work":
        value = f"value='{job.done:.4f}' max='{job.total:.4f}'" if job.total else ""
        lines.append(f"<progress {value} aria-label='progress'></progress>")
    lines.append(f"<p class='note' role='status' data-state='{job.state}'>{escape(said(job, before))}</p>")
    if job.fault:
        lines.append(fault(job.fault))
    parts = [f"<div class='frame'>{shown}</div><div class='said'>{''.join(lines)}</div>"]
    parts += [f"<p class='note'>{escape(note)}</p>" for note in dict.fromkeys(job.notes[-8:])]
    return f"<div class='stage-box'>{''.join(parts)}</div>"


def refused(line: str) -> str:
    """In its place, why nothing is drawn."""
    return f"<div class='stage-box'><div class='said'>{fault(line)}</div></div>"


def said(job: Job, before: int = 0) -> str:
    """Where a job is, in a line."""
    if job.state == "waiting":
        return "ended before it began" if not job.wanted else f"in the queue, {before} before it"
    if job.state == "at work":
        if not job.wanted:
            return "ending ..."
        if job.started is None:
            return "loading the model ..."
        left = "" if job.left is None else f", {Work.seconds_said(job.left)} left"
        return f"step {job.done:.2f} of {job.total:g}{left}"
    pictures = f", {len(job.pictures)} pictures" if len(job.pictures) != 1 else ", 1 picture"
    took = f"{job.seconds:.1f} s"
    if job.state == "done":
        return f"done in {took}" + (pictures if job.pictures else "")
    return f"ended after {took}{pictures}" if job.state == "ended" else f"failed after {took}"
