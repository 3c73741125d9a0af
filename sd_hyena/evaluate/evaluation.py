"""How close students are to their teacher, on what they never saw.

Per site, timestep and size the error of what the site answers; the UNet's prediction, with and without the caption and
guided; pictures on the same seeds. Everything is deterministic and lands in a folder: JSON, Markdown, pictures, TensorBoard.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.evaluate.advice import advice
from sd_hyena.evaluate.config import EvaluationConfig, checked
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.evaluate.report import Report, markdown
from sd_hyena.files.names import own_folder
from sd_hyena.generate.alternatives import load_alternatives
from sd_hyena.processes.ranks import say


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measure every alternative, write the report and return it. Raises BadInput before a model is loaded."""
    config = checked(config)
    with own_folder(config.out_dir) as folder:
        return _evaluated(config, folder)


def _evaluated(config: EvaluationConfig, folder: Path) -> dict[str, Any]:
    say(f"the report grows in {folder}: report.md, report.json and pictures, after each size")
    examiner = Examiner(config)
    report = Report(folder, examiner.facts)
    width, height = examiner.sizes[0]
    for alternative in load_alternatives(config.students, examiner.pipe.unet, tile=(height // 8, width // 8)):
        if not alternative.students:
            raise BadInput(
                f"students={alternative.entry!r}: attention is cheaper at every site at {width}x{height}; name sites, "
                "e.g. landmarks:level0, or a larger size first"
            )
        measured: dict[str, Any] = {}
        label = "+".join(dict.fromkeys(alternative.files.values()))
        while label in report.content["students"]:
            label += "'"
        for size, found, rows in examiner.examine(alternative.students):
            measured["{}x{}".format(*size)] = found
            report.picture(label, size, rows)
            report.add(label, measured, advice(measured))
            say(markdown({label: {"sizes": {"{}x{}".format(*size): found}, "advice": []}}))
    report.finish()
    return report.content
