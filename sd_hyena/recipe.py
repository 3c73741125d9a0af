"""python -m sd_hyena.recipe FILE [options of train.py]: stages of a distillation in turn, each from the student before.

FILE is YAML of several documents: the first holds what all stages share, each further one a stage. Options of the command
line win over the file. Every stage is a run in a folder of its own; the same command again goes on where it stopped. The last
one's students are OUT_DIR/hyena.pt, and OUT_DIR/NAME.pt with --name NAME.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from sd_hyena.errors import BadInput
from sd_hyena.files.names import for_a_shell
from sd_hyena.files.text import read_text
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options import help
from sd_hyena.options.command import run_parsed
from sd_hyena.options.command_line import parse, to_dict
from sd_hyena.options.shipped import CONFIGS, shipped_file
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.options.typed import command_name
from sd_hyena.processes.progress import work

Stage = Callable[[dict[str, Any]], TrainConfig]  # what is known only when its turn comes -> its config
DECIDED = ("pretrained_weight", "resume")  # by the recipe itself
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
    "name",
    "dry_run",
)


@dataclass(frozen=True, kw_only=True)
class RecipeConfig(TrainConfig):
    """Stages of a distillation in turn, each from the student before. FILE holds what all share and what each stage has of
    its own; options win over it, and where neither says anything holds what stands in brackets. The same command again
    goes on where it stopped."""

    LEFT_OUT: ClassVar[tuple[str, ...]] = (*DECIDED, "max_error", "budget", "devices", "num_nodes", "strategy")


def read_recipe(arguments: list[str]) -> list[Stage]:
    """The stages of the file that the first argument names, checked. Raises BadInput."""
    if not arguments or arguments[0].startswith("-"):
        names = ", ".join(path.name for path in shipped_recipes())
        raise BadInput(f"no recipe given; name a file, or one that ships as configs/recipes/FILE: {names}")
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


def shipped_recipes() -> list[Path]:
    """The files that come with the program."""
    return sorted((CONFIGS / "recipes").glob("*.yaml"))


def help_text(everything: bool, usage: str) -> str:
    """The options that a recipe takes, and the recipes that ship with the first sentence of each."""
    rows = []
    for path in shipped_recipes():
        comment = " ".join(line[2:] for line in read_text(path).split("target:")[0].splitlines())
        rows.append(f"  configs/recipes/{path.name:<22} {re.split('[.,:] ', comment)[0]}")
    return "\n".join([help.text(RecipeConfig, everything, f"{usage} FILE"), "recipes that ship", *rows]) + "\n"


def run_recipe(stages: list[Stage]) -> Path:
    """Train all stages that are not done yet and return the last student's file. A dry run is one of the first stage."""
    with work("loading PyTorch, diffusers and Lightning", announced=False):
        from sd_hyena.distil.larger_run import LargerRun
        from sd_hyena.distil.run_folder import newest_of, write_newest
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
        asked = _asked(to_dict(config)) | {"pretrained_weight": student}
        if done.is_file():
            record = _record(done)
            if _asked(TrainConfig.translated(record["config"])) != asked or not Path(record["student"]).is_file():
                raise BadInput(f"{own} was made by another recipe; give another --out_dir")
            print(f"done before: {record['student']}")
        else:
            later = {"out_dir": own, "cache_dir": config.cache_dir or folder / "cache"}
            later |= {"pretrained_weight": student} if student else {}
            later |= {} if config.dry_run else {"resume": "auto"}
            outcome = train(stage(later), LargerRun(followed_by=_rest(stages[number:], later)))
            if config.dry_run:
                return outcome.exported
            record = {"config": asked, "student": str(outcome.exported), "metrics": outcome.metrics}
            with replacing(done) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        student = record["student"]
    result, files = load_students(student), newest_of(config)
    for path in files:
        write_newest(path, result.training.get("run", ""), lambda path: save_students(path, result))
    model = f" -m {for_a_shell(config.teacher_model)}" if config.teacher_model else ""
    print(f"\nstudent of all stages: {files[-1]}")
    print(f"next: python -m sd_hyena generate{model} -y {for_a_shell(files[-1])} --compare")
    return Path(student)


def _asked(options: dict[str, Any]) -> dict[str, Any]:
    """What makes a stage what it is, wherever it runs."""
    return {name: value for name, value in options.items() if name not in OF_THE_MACHINE}


def _rest(stages: Sequence[Stage], later: dict[str, Any]) -> tuple[TrainConfig, ...]:
    """The stages still to come, with the cache of the one before them."""
    return tuple(stage({"cache_dir": later["cache_dir"]}) for stage in stages)


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
    if asked := help.asked_for(given):
        print(help_text(asked == help.ALL, command_name()), end="")
        return 0
    return run_parsed(lambda: read_recipe(given), run_recipe, given)


if __name__ == "__main__":
    sys.exit(command())
