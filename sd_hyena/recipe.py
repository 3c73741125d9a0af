"""python -m sd_hyena.recipe FILE [options of train.py]: stages of a distillation in turn, each from the student before.

FILE is YAML of several documents: the first holds what all stages share, each further one a stage. Options of the command
line win over the file. Every stage is a run in a folder of its own; the same command again goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.text import read_text
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.command import run_parsed
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.shipped import shipped_file
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import work

Stage = Callable[[dict[str, Any]], TrainConfig]  # what is known only when its turn comes -> its config
DECIDED = ("pretrained_weight", "resume", "dry_run")  # by the recipe itself
OF_THE_MACHINE = (
    "device",
    "dtype",
    "precision",
    "strategy",
    "micro_batch_size",
    "keep",
    "log_dir",
    "cache_dir",
    "debug",
)


def read_recipe(arguments: list[str]) -> list[Stage]:
    """The stages of the file that the first argument names, checked. Raises BadInput."""
    if not arguments or arguments[0].startswith("-"):
        raise BadInput("no recipe given; run python -m sd_hyena.recipe configs/recipes/FILE.yaml")
    shared, *stages = read_documents(shipped_file(arguments[0]))
    if not stages:
        raise BadInput(
            f"recipe={arguments[0]!r} has no stage: put each behind a line '---'; the first document is shared"
        )

    def config(stage: dict[str, Any], later: dict[str, Any]) -> TrainConfig:
        return parse(TrainConfig, [*arguments[1:], *(f"--{k}={v}" for k, v in later.items())], shared | stage)

    steps = [partial(config, stage) for stage in stages]
    for step in steps:
        found = step({})
        decided = [name for name in DECIDED if getattr(found, name)]
        if decided:
            raise BadInput(f"a recipe starts, goes on and hands over by itself: leave {', '.join(decided)} away")
        if found.target == "auto" or found.processes > 1:
            raise BadInput(
                "a recipe names its sites and runs on one device: no target=auto, no devices or num_nodes > 1"
            )
    return steps


def run_recipe(stages: list[Stage]) -> Path:
    """Train all stages that are not done yet and return the last student's file."""
    with work("loading PyTorch, diffusers and Lightning", announced=False):
        from sd_hyena.distil.training import train
        from sd_hyena.files.atomic import replacing
        from sd_hyena.students.checkpoint import load_students, save_students

    student, folder = "", Path(stages[0]({}).out_dir)
    for number, stage in enumerate(stages, start=1):
        config = stage({})
        print(
            f"\n== stage {number} of {len(stages)}: {config.stage}, {config.width}x{config.height}, {config.n_steps} steps =="
        )
        own = folder / f"{number}-{config.stage}"
        done = own / "done.json"
        asked = {name: value for name, value in to_dict(config).items() if name not in OF_THE_MACHINE}
        asked["pretrained_weight"] = student
        if done.is_file():
            record = _record(done)
            if TrainConfig.translated(record["config"]) != asked or not Path(record["student"]).is_file():
                raise BadInput(f"{own} was made by another recipe; give another --out_dir")
            print(f"done before: {record['student']}")
        else:
            later = {"out_dir": own, "resume": "auto", "cache_dir": config.cache_dir or folder / "cache"}
            later |= {"pretrained_weight": student} if student else {}
            outcome = train(stage(later))
            record = {"config": asked, "student": str(outcome.exported), "metrics": outcome.metrics}
            with replacing(done) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        student = record["student"]
    result = load_students(student)
    for suffix in (".safetensors", ".pt"):
        save_students(folder / f"hyena{suffix}", result)
    print(f"\nstudent of all stages: {folder}/hyena.pt")
    return Path(student)


def _record(done: Path) -> dict[str, Any]:
    """What a stage left when it was done. Raises BadInput."""
    try:
        record = json.loads(read_text(done))
        return {"config": dict(record["config"]), "student": str(record["student"])}
    except Exception as error:  # of what is no record
        raise BadInput(f"{str(done)!r} is damaged ({str(error)[:120]}); delete it to train this stage again") from None


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    return run_parsed(lambda: read_recipe(given), run_recipe, given)


if __name__ == "__main__":
    sys.exit(command())
