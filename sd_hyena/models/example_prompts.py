"""The prompts that come with a model, and which of them are held out."""

from __future__ import annotations

from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.files.text import read_text

NATURAL_PROMPTS = Path(__file__).with_name("prompts.txt")


def prompts_of(path: Path, file: str = "") -> list[str]:
    """The prompts of `file`, else the model's own `prompts.txt`, else a list for natural images. Raises BadInput."""
    source = Path(file) if file else path / "prompts.txt"
    source = source if file or source.is_file() else NATURAL_PROMPTS
    try:
        prompts = [line.strip() for line in read_text(source).splitlines() if line.strip()]
    except BadInput as error:
        raise BadInput(f"prompts: {error}") from None
    if not prompts:
        raise BadInput(f"prompts={str(source)!r} holds no prompt; write one a line")
    return prompts


def split_prompts(prompts: list[str]) -> tuple[list[str], list[str]]:
    """Those to train on, and the last quarter, for validation and evaluation; one prompt serves as both."""
    prompts = list(dict.fromkeys(prompts))
    n = max(1, len(prompts) - max(1, len(prompts) // 4))
    return prompts[:n], prompts[n:] or prompts
