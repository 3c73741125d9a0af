"""One engine, and the one thread that draws with it: jobs in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, TypeVar

from sd_hyena.ui.job import Job

SomeJob = TypeVar("SomeJob", bound=Job)
REMEMBERED = 32  # jobs that are over, for pages that still ask


class Worker:
    """Loads what drawing needs as soon as it is started, before the first job comes."""

    def __init__(self):
        self._waiting: deque[Job] = deque()
        self._known: dict[int, Job] = {}
        self._change = threading.Condition()
        self._closing = False
        self.ready = threading.Event()  # what drawing needs is imported
        self.running: Job | None = None
        self.engine: Any = None
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)

    def start(self) -> None:
        """Begin; jobs may wait already."""
        self._thread.start()

    def submit(self, job: SomeJob) -> SomeJob:
        """Put it behind those that wait."""
        with self._change:
            over = [number for number, one in self._known.items() if one.over.is_set()]
            for number in over[:-REMEMBERED]:
                del self._known[number]
            self._known[job.number] = job
            self._waiting.append(job)
            self._change.notify_all()
        return job

    def find(self, number: int | None) -> Job | None:
        """A job by its number."""
        return self._known.get(number or 0)

    def going(self, number: int | None) -> int:
        """The number, if it is that of a job that is not over; else 0, at which nobody looks."""
        job = self.find(number)
        return job.number if job and not job.over.is_set() else 0

    def newest(self) -> Job | None:
        """The one at work, or the next one, for a page that was lost."""
        with self._change:
            return self.running or (self._waiting[0] if self._waiting else None)

    def before(self, job: Job) -> int:
        """How many are done before this one."""
        with self._change:
            return (self._waiting.index(job) + (self.running is not None)) if job in self._waiting else 0

    def close(self) -> None:
        """End what is at work and wait for it; what waits is not begun."""
        with self._change:
            self._closing = True
            for job in (*self._waiting, *filter(None, [self.running])):
                job.cancel()
            self._change.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _work(self) -> None:
        from sd_hyena.generate.engine import Engine

        self.engine = Engine()
        self.ready.set()
        while True:
            with self._change:
                while not self._waiting and not self._closing:
                    self._change.wait()
                if self._closing:
                    break
                self.running = self._waiting.popleft()
            self.running.run(self.engine)
            with self._change:
                self.running = None
        self.engine.close()
