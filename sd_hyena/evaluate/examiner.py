"""Asks teacher and students the same questions, at every size: errors on held-out states, and pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.errors import Errors
from sd_hyena.evaluate.pictures import Pictures
from sd_hyena.generate.engine import Engine
from sd_hyena.models.example_prompts import prompts_of, split_prompts
from sd_hyena.models.location import model_path
from sd_hyena.processes.progress import work
from sd_hyena.sites import find_sites


class Examiner:
    """Examines alternatives of one model in turn; what the teacher answers is asked once. Raises BadInput.

    With a folder `kept_in` pictures are kept there; whoever changes the loaded model does without.
    """

    def __init__(self, config: EvaluationConfig, engine: Engine | None = None, kept_in: Path | None = None):
        _, prompts = split_prompts(prompts_of(model_path(config.model), config.prompts))
        prompts = [prompts[i % len(prompts)] for i in range(max(config.images, config.states))]
        self.config = config
        self.pictures = Pictures(config, prompts, engine or Engine(), kept_in)
        model = self.pictures.model
        self.pipe, self.sites = model.pipe, find_sites(model.pipe.unet)
        self.facts = {"model": model.path.name, "model_sha256": model.sha256}
        self.sizes = self.pictures.sizes
        self.errors = Errors(config, prompts, self.pictures, self.sites)

    def examine(self, students: dict[str, Any]) -> Iterator[tuple[tuple[int, int], dict[str, Any], list]]:
        """For each size: (width, height), its measurements, and rows of (scale, teacher's, student's images)."""
        for size in self._served(students):
            with work("errors at {}x{}: of the sites, then of the prediction".format(*size), 2) as shown:
                measured = {"sites": self.errors.of_sites(students, size)}
                shown.to(1)
                measured["prediction"] = self.errors.of_prediction(students, size)
            measured["images"], rows = {}, []
            for scale in self.config.scales():
                teacher = self.pictures.teachers(size, scale)
                student = self.pictures.drawn(size, scale, students)
                measured["images"][f"{scale:g}"] = self.pictures.compared(teacher, student)
                rows.append((scale, teacher, student))
            yield size, measured, rows

    def kept(self, alternatives: Sequence[dict[str, Any]]) -> set[Path]:
        """The files of all pictures that these take. Raises BadInput for students that serve none of the sizes."""
        sets = [self.pictures.kept_latents(range(self.config.states))]
        for students in alternatives:
            for size in self._served(students):
                for scale in self.config.scales():
                    sets += [self.pictures.kept(size, scale), self.pictures.kept(size, scale, students)]
        return {file for pieces in sets if pieces for file in pieces.files}

    def _served(self, students: dict[str, Any]) -> list[tuple[int, int]]:
        """The sizes that all students can serve: a 1-D one has a single size. Raises BadInput if there is none."""
        sites = {site.name: site for site in self.sites}
        served = [
            (width, height)
            for width, height in self.sizes
            if all(s.spec.serves(sites[n].size(height // 8, width // 8)) for n, s in students.items())
        ]
        if not served:
            given = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            raise BadInput(
                f"sizes: the students are one-dimensional and serve none of {given}; name the size of training"
            )
        return served
