"""`-p @FILE`: a text file of prompts, one a line, each with flags of its own behind it if need be.

a red circle on white
a blue square on green -- -k 7 -W 512
"""

from __future__ import annotations

import os
import re
import shlex
from typing import NamedTuple

from sd_hyena.errors import BadInput
from sd_hyena.files.text import read_text

SIGN = "@"
FLAGS = re.compile(r"(?:^|\s)--(?=\s|[A-Za-z])")
OF_ALL = (
    "config",
    "from",
    "from_image",
    "grid",
    "no_grid",
    "help",
    "help_all",
    "print_config",
    "prompt",
    "debug",
    "no_debug",
)
SHORT_OF_ALL = ("-h", "-p")


class PromptLine(NamedTuple):
    """A prompt and the flags behind it, with where it stands for an error."""

    prompt: str
    flags: tuple[str, ...]
    where: str


def is_file_of_prompts(prompt: str | None) -> bool:
    """A prompt that is to begin with the sign has a blank before it."""
    return bool(prompt) and prompt.startswith(SIGN)


def prompt_lines(given: str) -> list[PromptLine]:
    """The lines of `@FILE`; empty ones and those that begin with # are passed over. Raises BadInput."""
    path = given.removeprefix(SIGN)
    if not os.path.isfile(path):
        raise BadInput(
            f"prompt={given!r}: {path!r} is no file of prompts; for a prompt that begins with @ put a blank before it"
        )
    try:
        text = read_text(path)
    except BadInput as error:
        raise BadInput(f"prompt={given!r}: {error}") from None
    lines = [_line(line.strip(), f"{path}, line {n}") for n, line in enumerate(text.splitlines(), start=1)]
    found = [line for line in lines if line is not None]
    if not found:
        raise BadInput(f"prompt={given!r} holds no prompt; write one a line")
    return found


def _line(text: str, where: str) -> PromptLine | None:
    if not text or text.startswith("#"):
        return None
    match = FLAGS.search(text)
    prompt, flags = (text[: match.start()].strip(), text[match.start() :].strip()) if match else (text, "")
    try:
        words = shlex.split(re.sub(r"^--(?=\s)", "", flags))
    except ValueError as error:
        raise BadInput(f"{where}: {flags!r} cannot be read as flags ({error}); put quotes around values") from None
    if not prompt or prompt.startswith(SIGN):
        raise BadInput(f"{where}: {text[:60]!r} has no prompt; write PROMPT -- FLAGS")
    for word in words:
        name = word.partition("=")[0].lstrip("-").replace("-", "_")
        if word in SHORT_OF_ALL or (word.startswith("--") and name in OF_ALL):
            raise BadInput(f"{where}: {word} is of the whole command, not of a line")
    if words and not words[0].startswith("-"):
        raise BadInput(f"{where}: {words[0][:60]!r} behind -- is no flag; write PROMPT -- FLAGS")
    return PromptLine(prompt, tuple(words), where)
