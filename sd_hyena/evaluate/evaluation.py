"""How close students are to their teacher, on what they never saw.

Per site, timestep and size the error of what the site answers; the UNet's prediction, with and without the caption and
guided; pictures on the same seeds. Everything is deterministic and lands in a folder: JSON, Markdown, pictures, TensorBoard.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.evaluate.advice import advice
from sd_hyena.evaluate.config import EvaluationConfig, checked
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.evaluate.report import Report, markdown
from sd_hyena.files.names import own_folder
from sd_hyena.generate.alternatives import Alternative, keep_attention, load_alternatives
from sd_hyena.processes.ranks import say


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measure every alternative, write the report and return it. Raises BadInput before a model is loaded.

    Pictures are kept one by one as they are drawn: after an end the same again goes on, with the same numbers.
    """
    config = checked(config)
    with own_folder(config.out_dir) as folder, own_folder(_cache_of(config, folder), "cache_dir") as cache:
        return _evaluated(config, folder, cache)


def _cache_of(config: EvaluationConfig, folder: Path) -> Path:
    """Where a training keeps its own, if nobody says otherwise: beside the report, or within it if that cannot be."""
    beside = folder.parent if os.access(folder.parent, os.W_OK | os.X_OK) else folder
    return Path(config.cache_dir or beside / "cache")


def _evaluated(config: EvaluationConfig, folder: Path, cache: Path) -> dict[str, Any]:
    say(f"the report grows in {folder}: report.md, report.json and pictures, after each size")
    examiner = Examiner(config, kept_in=cache)
    alternatives = alternatives_of(config, examiner)
    pictures = examiner.kept([alternative.students for alternative in alternatives])
    if found := _there(pictures):
        say(f"{found} of {len(pictures)} pictures are kept from a run before, in {cache}")
    try:
        return _reported(examiner, alternatives, Report(folder, examiner.facts))
    except BaseException:
        say(f"{_there(pictures)} of {len(pictures)} pictures are kept; the same command goes on from there")
        raise


def alternatives_of(config: EvaluationConfig, examiner: Examiner) -> list[Alternative]:
    """What is to be measured, none of it without students. Raises BadInput."""
    unet, (width, height) = examiner.pipe.unet, examiner.sizes[0]
    tile = height // 8, width // 8
    found = load_alternatives(config.students, unet, tile=tile)
    for alternative in found:
        if not alternative.students:
            raise BadInput(
                f"students={alternative.entry!r}: attention is cheaper at every site at {width}x{height}; name sites, "
                "e.g. landmarks:level0, or a larger size first"
            )
    left = [keep_attention(alternative, unet, config.keep_attention, tile, 2) for alternative in found]
    for alternative in left:
        if not alternative.students:
            raise BadInput(
                f"keep_attention={config.keep_attention!r} leaves no student of {alternative.entry}; keep fewer sites"
            )
    return left


def _reported(examiner: Examiner, alternatives: Sequence[Alternative], report: Report) -> dict[str, Any]:
    for alternative in alternatives:
        measured: dict[str, Any] = {}
        label = "+".join(dict.fromkeys(alternative.files.values()))
        label += f" without {examiner.config.keep_attention}" if alternative.kept else ""
        while label in report.content["students"]:
            label += "'"
        for size, found, rows in examiner.examine(alternative.students):
            measured["{}x{}".format(*size)] = found
            report.picture(label, size, rows)
            report.add(label, measured, advice(measured))
            say(markdown({label: {"sizes": {"{}x{}".format(*size): found}, "advice": []}}))
    report.finish()
    return report.content


def _there(files: Iterable[Path]) -> int:
    return sum(file.exists() for file in files)
