"""What the page has asked for: work that waits its turn, is watched while it is done, and can be ended."""

from __future__ import annotations

import base64
import io
import itertools
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options.command_line import with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.rules import drawn_seed
from sd_hyena.ui.fault import line_of

OFTEN = 0.3  # seconds between previews
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Picture:
    """A picture on disk, the config that draws it alone again, and the seconds that it took."""

    path: Path
    config: GenerateConfig
    seconds: float


@dataclass
class Job:
    """Work for the worker. `state`: waiting, at work, done, ended, failed; `fault` says why it failed."""

    work: Callable[[Any, Job], Any] | None = None  # engine, this job -> result
    name: str = "work"
    number: int = field(default_factory=lambda: next(_numbers))
    state: str = "waiting"
    fault: str = ""
    bad_input: bool = False
    result: Any = None
    notes: list[str] = field(default_factory=list)
    done: float = 0.0
    total: float = 0.0
    started: float | None = None  # when its first step was told
    seconds: float = 0.0  # that it took in all
    preview: str = ""  # data URL
    pictures: list[Picture] = field(default_factory=list)
    wanted: bool = True
    over: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask it to end: at its next tile, or before it begins."""
        self.wanted = False

    @property
    def left(self) -> float | None:
        """Seconds to go, as far as can be told."""
        if self.started is None or self.done <= 0:
            return None
        return (self.total - self.done) * (time.monotonic() - self.started) / self.done

    def run(self, engine: Any) -> None:
        """Do the work; whatever happens is told by `state`."""
        from sd_hyena.generate.watch import Cancelled

        began, self.state = time.monotonic(), "at work"
        try:
            if not self.wanted:
                raise Cancelled
            self.result = self.do(engine)
            self.state = "done"
        except Cancelled:
            self.state = "ended"
        except BadInput as error:
            self.state, self.fault, self.bad_input = "failed", line_of(error), True
        except Exception as error:
            if not _is_told(error):
                traceback.print_exc()
            self.state = "failed"
            self.fault = line_of(error)[:400] or type(error).__name__
        finally:
            self.seconds, self.preview = time.monotonic() - began, ""
            self.over.set()

    def do(self, engine: Any) -> Any:
        return self.work(engine, self)


def _is_told(error: Exception) -> bool:
    """Whether an error is one that says all there is to say."""
    from sd_hyena.generate.engine import NotDrawn

    return isinstance(error, NotDrawn)


@dataclass
class Drawing(Job):
    """The pictures of a config, each written when it is done."""

    config: GenerateConfig = field(default_factory=GenerateConfig)
    name: str = "drawing"
    taken: Callable[[Picture], Any] = lambda picture: None  # is told of each picture
    told: Callable[[Job], bool] | None = None  # is told how far this one is, and says whether it is still wanted

    def do(self, engine: Any) -> list[Path]:
        from sd_hyena.files.names import next_number, writable_folder
        from sd_hyena.generate.generation import write

        config = with_paths(self.config)
        folder = writable_folder(config.out_dir)
        first = next_number(folder, config.name_format)
        self.config = config = replace(config, seed=drawn_seed(config.seed))
        engine.load(config)  # so that the seconds are those of drawing
        watch, since = _Told(self, engine), time.monotonic()
        with closing(engine.draw(config, watch)) as drawings:
            for drawn in drawings:
                path = write(drawn, config, folder, watch, first)[0]
                picture = Picture(path.absolute(), drawn.config, time.monotonic() - since)
                self.pictures.append(picture)
                self.taken(picture)
                since = time.monotonic()
        return [picture.path for picture in self.pictures]


def _Told(job: Drawing, engine: Any) -> Any:
    """A watch that keeps a job informed."""
    from sd_hyena.generate.watch import Watch

    class Told(Watch):
        last, seen = 0.0, None

        def step(self, done, total, latents) -> None:
            now = time.monotonic()
            if job.started is None:
                job.started = now
            job.done, job.total = done, total
            if latents is not None and latents is not self.seen and now - self.last > OFTEN:
                self.last, self.seen = now, latents
                job.preview = data_url(engine.preview(latents[0]))
            self.go_on()

        def go_on(self) -> None:
            if job.told is not None:
                job.wanted = job.told(job)

        def cancelled(self) -> bool:
            self.go_on()
            return not job.wanted

        def note(self, line: str) -> None:
            job.notes.append(line)

    return Told()


def data_url(image: Any) -> str:
    """A small PIL image as text that a page shows."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
