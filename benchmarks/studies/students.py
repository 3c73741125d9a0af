"""python -m benchmarks.studies.students: the students that ship, and the same sites untrained, held to the teacher.

Held-out captions and seeds at several sizes and scales of guidance. A row is measured and written by itself; what the
table has is not measured again, so the command resumes what was ended, on any machine. Each row has the command that
gives its figures alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.harness.record import RESULTS, commit, write
from benchmarks.report.plots import read
from sd_hyena.evaluate.config import EvaluationConfig, checked
from sd_hyena.evaluate.evaluation import alternatives_of
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.generate.engine import Engine

ALLOTMENT = "landmarks:512:IN01:OUT10+landmarks:256:OUT11+landmarks:128:IN02:OUT09:level1:level2:level3"
KEEP = " --keep_attention "
STUDENTS = {  # what evaluate is given, and what it is
    "landmarks:256:level0": "untrained, level 0, 256 clusters",
    "landmarks:256:all": "untrained, all sixteen, 256 clusters",
    ALLOTMENT: "untrained, all sixteen, the clusters of `all`",
    "landmarks": "untrained, as many clusters as pay at the size: 128 at level 0",
    "level0": "`level0`, trained",
    "all": "`all`, trained",
}
LADDER = {  # five, ten and sixteen of sixteen sites are level 0, levels 0 and 1, and all
    "landmarks:256:level0:level1": "untrained, levels 0 and 1, 256 clusters",
    f"all{KEEP}level1,level2,level3": "`all`, trained, level 0 of it",
    f"all{KEEP}level2,level3": "`all`, trained, levels 0 and 1 of it",
}


@dataclass(frozen=True)
class Case:
    """What students are held to: pictures of a size at a scale of guidance, and states for the errors."""

    size: str
    guidance: float
    images: int
    states: int


CASES = {
    Case("256x256", 5, 64, 64): tuple(STUDENTS),
    Case("512x512", 5, 16, 8): ("landmarks:256:level0", "landmarks:256:all", ALLOTMENT, "level0", "all", *LADDER),
    Case("384x640", 5, 16, 8): ("landmarks:256:level0", "landmarks:256:all", ALLOTMENT, "level0", "all"),
    Case("256x256", 10, 16, 16): ("landmarks:256:all", ALLOTMENT, "level0", "all"),
    Case("256x256", 1, 16, 16): ("landmarks:256:all", ALLOTMENT, "level0", "all"),
    Case("1024x1024", 5, 4, 4): ("landmarks:256:all", "all"),
}


def name(case: Case, file: str) -> str:
    """Of a row, for `--only`."""
    return f"{file} {case.size} {case.guidance:g}"


def command_of(case: Case, file: str) -> str:
    """What measures a row alone."""
    judged = f"--guidance {case.guidance:g} --images {case.images} --states {case.states}"
    return f"python -m sd_hyena.evaluate {file} --sizes {case.size} {judged}"


def wanted(only: str, made: set[str]) -> Iterator[tuple[Case, str]]:
    """The rows of that pattern that are not made, those of one case after each other: its teacher's pictures serve all."""
    for case, files in CASES.items():
        yield from ((case, file) for file in files if fnmatch(name(case, file), only) and name(case, file) not in made)


def measured(case: Case, file: str, examiner: Examiner) -> dict[str, Any]:
    """One row."""
    (alternative,) = alternatives_of(checked(examiner.config), examiner)
    ((_, found, _),) = examiner.examine(alternative.students)
    image, errors = found["images"][f"{case.guidance:g}"], found["prediction"]
    shown = ["psnr_median", "psnr_mean", "psnr_min", "ssim_mean", "share_above_20_dB"]
    return {
        "students": (STUDENTS | LADDER)[file],
        "file": file,
        "size": case.size,
        "guidance": f"{case.guidance:g}",
        "images": image["images"],
        "states": case.states,
        **{column: float(f"{image[column]:.4g}") for column in shown},
        "teacher_right": round(image["teacher_right"] * image["images"]),
        "student_right": round(image["student_right"] * image["images"]),
        "prediction": float(f"{errors['both']:.2g}"),
        "guided": float(f"{errors[f'guided_{case.guidance:g}']:.2g}"),
        "command": command_of(case, file),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def main(only: str = "*", again: bool = False, listed: bool = False, out: str = str(RESULTS)) -> None:
    """Measure the rows that the table lacks.

    Args:
        only: rows whose name, `FILE SIZE GUIDANCE`, is of this pattern, e.g. "all *" or "* 512x512 5"
        again: measure them although the table has them
        listed: print the names of the rows that are to be measured, and end
        out: folder of students.csv
    """
    path = Path(out) / "students.csv"
    of = lambda row: f"{row['file']} {row['size']} {row['guidance']}"
    table = {of(row): row for row in read(path)} if path.exists() else {}
    order = [name(case, file) for case, files in CASES.items() for file in files]
    engine, seen = Engine(), (None, None)
    for case, file in wanted(only, set() if again else set(table)):
        if listed:
            print(name(case, file))
            continue
        students, _, kept = file.partition(KEEP)
        config = EvaluationConfig(
            students=students,
            keep_attention=kept,
            sizes=case.size,
            guidance=f"{case.guidance:g}",
            images=case.images,
            states=case.states,
            device="cpu",
        )
        examiner = seen[1] if seen[0] == case else Examiner(config, engine)
        examiner.config, seen = config, (case, examiner)
        table[name(case, file)] = measured(case, file, examiner)
        rows = sorted(table.values(), key=lambda row: order.index(of(row)) if of(row) in order else len(order))
        write(
            "students",
            rows,
            Path(out),
            ("file", "size", "psnr_median"),
            command="python -m benchmarks.studies.students",
        )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
