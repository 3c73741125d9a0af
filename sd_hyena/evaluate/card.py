"""python -m sd_hyena.evaluate.card out/hyena.safetensors: the card of trained students, and, if asked, both onto the Hub.

The card is written from what the file says of itself, beside it as hyena.md. A card that is there already is kept, so it can
be edited before `--push USER/NAME` uploads it as the README.md of that repository.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sd_hyena import __version__
from sd_hyena.errors import BadInput
from sd_hyena.options.command import run
from sd_hyena.options.command_line import option

WHEEL = f"sd_hyena-{__version__}-py3-none-any.whl"
TAGS = ["stable-diffusion", "text-to-image", "hyena", "distillation"]


class NotPushed(RuntimeError):
    """The Hub could not be reached, or did not take the files; the card is written."""


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Write the model card of trained students; with --push upload both to the Hugging Face Hub."""

    students: str = option("", "the .safetensors file of train.py, also as a plain argument")
    report: str = option("", "report.json of python -m sd_hyena.evaluate, whose tables the card shows")
    name: str = option("", "the students' name, the card's title; default: the file's")
    base_model: str = option("", "the base model's name on the Hub, USER/NAME")
    license: str = option("other", "the Hub's word for the base model's licence, e.g. creativeml-openrail-m")
    push: str = option("", "USER/NAME: upload to that repository, made if it is not there; nothing is uploaded without")
    private: bool = option(False, "make it a private one")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        if self.students and (Path(self.students).suffix != ".safetensors" or not Path(self.students).is_file()):
            raise BadInput(f"students={self.students!r} is no .safetensors file; training writes out/hyena.safetensors")
        if self.report and not Path(self.report).is_file():
            raise BadInput(f"report={self.report!r} is no file; python -m sd_hyena.evaluate writes report.json")
        for name in ("push", "base_model"):
            value = getattr(self, name)
            if value and not re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", value, re.ASCII):
                raise BadInput(f"{name}={value!r} must be USER/NAME of a repository of the Hugging Face Hub")
        if not re.fullmatch(r"[\w.-]{1,96}", self.license, re.ASCII):
            raise BadInput(f"license={self.license!r} must be one of the Hub's identifiers, e.g. mit")
        if self.private and not self.push:
            raise BadInput("private needs --push USER/NAME too")


def main(config: CardConfig) -> None:
    """Write the card unless there is one, and push if asked. Raises BadInput, NotPushed."""
    from sd_hyena.files.atomic import replacing
    from sd_hyena.students.checkpoint import load_students

    if not config.students:
        raise BadInput("no students given; name the file of train.py, e.g. out/hyena.safetensors")
    path = Path(config.students)
    file = load_students(path)
    card = path.with_suffix(".md")
    if card.exists():
        print(f"{card} is there already and stays as it is; delete it to have it written anew")
    else:
        text = card_of(
            file,
            path.name,
            title=config.name,
            license=config.license,
            base_model=config.base_model,
            tables=_read_report(config.report, path, file.training),
        )
        with replacing(card) as temporary:
            temporary.write_text(text, "utf-8")
        print(card)
    if config.push:
        print(_pushed(config, card, path))


def card_of(
    file: Any, name: str, *, title: str = "", license: str = "other", base_model: str = "", tables: str = ""
) -> str:
    """The card of a StudentFile called `name`, as Markdown behind the Hub's YAML header."""
    import yaml

    training = file.training
    options, metrics = _mapping(training.get("config")), _mapping(training.get("metrics"))
    hash_ = _plain(training.get("teacher_sha256", "not recorded"))
    header = {"license": license, "library_name": "sd_hyena", "tags": TAGS}
    header |= {"base_model": base_model, "base_model_relation": "adapter"} if base_model else {}
    base = base_model or _plain(training.get("teacher", "not recorded"))
    rows = [
        f"| {_plain(s.spec.short)} | {_plain(s.spec.operator)} | {s.spec.channels} | {_size(s.spec.size)} | "
        f"{sum(p.numel() for p in s.parameters()):,} |"
        for s in file.students.values()
    ]
    measured = [
        f"| {_plain(key.removeprefix('val/'))} | {value:.4g} |" for key, value in metrics.items() if _number(value)
    ]
    lines = [
        "---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "",
        f"# {_plain(title or Path(name).stem)}: Hyena in place of self-attention", "",
        "**sd_hyena** draws large Stable Diffusion images without the quadratic cost of self-attention: it puts sub-quadratic "
        "operators, *students*, in the place of chosen self-attentions of a model's UNet, which taught them.", "",
        f"These students stand in for self-attentions of the UNet of **{base}** (sha256 `{hash_}`, short `{hash_[:10]}`). "
        "They are no model by themselves: they work inside that one, and add their change to the projections of models that "
        "were made from it.", "",
        "## Sites", "",
        "| site | operator | channels | sizes | parameters |", "|---|---|---|---|---|", *rows, "",
        "## How to use", "",
        *_use(_plain(name), options, _plain(training.get("teacher", "MODEL"))), "",
        f"`sd-hyena describe {_plain(name)}` tells everything that the file says of itself.", "",
        "## Training", "",
        f"{_plain(training.get('step', 'an unknown number of'))} steps of batch {_plain(options.get('batch_size', '?'))}, "
        f"stage {_plain(options.get('stage', '?'))}, data {_plain(options.get('data', '?'))}, "
        f"seed {_plain(options.get('seed', '?'))}; "
        f"{', '.join(f'{_plain(k)} {_plain(v)}' for k, v in _mapping(training.get('versions')).items())}.", "",
    ]  # fmt: skip
    if measured:
        lines += ["Held-out states of that training:", "", "| measure | value |", "|---|---|", *measured, ""]
    if tables:
        lines += [
            "## Errors",
            "",
            "An evaluation (`python -m sd_hyena.evaluate`) on captions and seeds never trained on:",
            "",
            tables,
            "",
        ]
    lines += [
        "## Licence", "",
        "The students were trained on what the base model answers, and are of use with it alone: its licence, and what it "
        "forbids, holds for them too.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _use(name: str, options: dict[str, Any], teacher: str) -> list[str]:
    """How to install it, a command, and the same from Python; of students of the shipped model nothing is to be named."""
    shipped = options.get("teacher_model") == ""
    prompt = "a red circle on blue" if shipped else "a lighthouse on a rocky coast at sunset"
    width = options.get("width") if _number(options.get("width")) else 512
    height = options.get("height") if _number(options.get("height")) else 0
    size = f"-W {width}" + (f" -H {height}" if height and height != width else "")
    model = "" if shipped else f"-m {teacher} "
    where = (
        "it comes with sd_hyena"
        if shipped
        else f"`{teacher}` is the base model: a diffusers folder, a `.safetensors` or a `.ckpt` file"
    )
    return [
        f"With Python 3.11 or newer install the package `sd_hyena`, from its wheel (`pip install {WHEEL}`) or in a copy of its "
        f"repository (`pip install .`); then, beside this file ({where}):", "",
        "```bash", f'sd-hyena generate {model}-y {name} {size} -p "{prompt}"', "```", "",
        "or", "",
        "```python",
        "from sd_hyena import load_pipeline, load_students, swapped", "",
        f"pipe = load_pipeline({'' if shipped else repr(teacher)})",
        f'with swapped(pipe.unet, load_students("{name}", pipe.unet)):',
        f'    pipe("{prompt}", width={width}, height={height or width}).images[0].save("picture.png")',
        "```",
    ]  # fmt: skip


def _read_report(path: str, students: Path, training: dict[str, Any]) -> str:
    """The tables of an evaluation of these students. Raises BadInput for one of others."""
    if not path:
        return ""
    from sd_hyena.evaluate.report import markdown

    try:
        report = json.loads(Path(path).read_text("utf-8"))
        entry, model = report["students"][students.stem], report["model_sha256"]
        tables = markdown({students.stem: entry})
        if command := _plain(report.get("command", "")):
            tables = f"`{command}`\n\n{tables}"
    except Exception as error:  # whatever a table stumbles over
        raise BadInput(
            f"report={path!r} is no report of an evaluation of {students.stem} ({type(error).__name__}: {error})"
        ) from None
    if model != training.get("teacher_sha256"):
        raise BadInput(f"report={path!r} was measured with another base model than these students were trained on")
    return tables


def _pushed(config: CardConfig, card: Path, students: Path) -> str:
    """Upload both in one commit; the commit's address. Raises NotPushed."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = [CommitOperationAdd("README.md", card), CommitOperationAdd(students.name, students)]
    try:
        hub = HfApi(library_name="sd_hyena")
        hub.create_repo(config.push, private=config.private, exist_ok=True)
        return str(hub.create_commit(config.push, files, commit_message=f"{students.name} and its card").commit_url)
    except Exception as error:  # the Hub's errors have no common base
        raise NotPushed(f"push={config.push!r}: {error}; nothing is uploaded, the card is {card}") from error


def _size(size: tuple[int, int] | None) -> str:
    return "any" if size is None else f"{size[1]}x{size[0]} cells"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _plain(value: Any) -> str:
    """A stranger's word as one that does nothing in Markdown."""
    return "".join(c for c in str(value)[:200] if c.isprintable() and c not in "`|<>[]*\\")


def command(arguments: list[str] | None = None) -> int:
    """Run the command line, whose first plain argument may be the file, and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    files = list(takewhile(lambda argument: not argument.startswith("-"), given))
    options = ["--students", files[0]] if len(files) == 1 else []
    return run(CardConfig, main, [*options, *given[len(options) // 2 :]])


if __name__ == "__main__":
    sys.exit(command())
