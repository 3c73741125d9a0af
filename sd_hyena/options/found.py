"""What a picture of another program says: options of ours, names of files, and what of it is not followed."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from sd_hyena.errors import BadInput

SEEDS = 1 << 32  # more bits than these a CPU's noise does not depend on
LARGEST_SEED = 1 << 64
WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
QUOTED = 60  # characters of a value that a note quotes


@dataclass
class Found:
    """Filled while a picture's text is read.

    beside: options that mean something only beside a picture to start from, which is not in the text.
    names: files that it names, by the option they are for, each with its hash or an empty text.
    hashes: of a picture of ours, which names files by their paths: the hash of each file by its option and plain name.
    left: what is not followed, each with the option that would answer it or an empty text.
    notes: what is followed in another way, with the same picture.
    """

    program: str
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    hashes: dict[tuple[str, str], str] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def leave(self, what: str, option: str = "") -> None:
        """Note what is not followed, once."""
        if (entry := (" ".join(what.split())[:160], option)) not in self.left:
            self.left.append(entry)

    def number(self, option: str, value: Any, key: str, whole: bool = False) -> None:
        """An option from a number, or a text that is one; 20.0 is whole. Raises BadInput."""
        self.options[option] = self.read_number(value, key, whole)

    def read_number(self, value: Any, key: str, whole: bool = False) -> int | float:
        """Raises BadInput."""
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(
            r"[+-]?([0-9]{1,40}\.?[0-9]{0,40}|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?", text
        ):
            raise self.damaged(key, value)
        if whole and (plain := re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", text)):
            return int(plain[1])
        number = float(text)
        if not math.isfinite(number) or (whole and not number.is_integer()):
            raise self.damaged(key, value)
        return int(number) if whole else number

    def seed(self, value: Any, key: str = "Seed") -> None:
        """Of up to 64 bits, of which a CPU's noise takes the lower 32. Raises BadInput."""
        seed = self.read_number(value, key, whole=True)
        if not -1 <= seed < LARGEST_SEED:
            raise BadInput(
                f"{self.source}: its seed {seed} is none of 64 bits; give --seed, and the picture with --from"
            )
        if seed >= SEEDS:
            self.notes.append(f"seed {seed} is taken as {seed % SEEDS}, from which a CPU draws the same noise")
        self.options["seed"] = seed if seed == -1 else seed % SEEDS

    def size(self, width: Any, height: Any) -> None:
        """Raises BadInput."""
        self.number("width", width, "width", whole=True)
        self.number("height", height, "height", whole=True)

    def name(self, option: str, name: str, hash: str = "") -> None:
        """A file that the picture was made with."""
        if name and (name, hash) not in self.names.setdefault(option, []):
            self.names[option].append((name, hash))

    def told(self, chosen: dict[str, Any], untouched: dict[str, Any], lent: bool = False) -> str:
        """What is followed in another way, and what is not and no flag has answered, in as many lines; may be empty.

        lent: a picture lends its words to a drawing that starts from it, which is meant to differ.
        """
        lines = [f"note: {'; '.join(self.notes)}"] if self.notes and chosen["seed"] == untouched["seed"] else []
        left = "; ".join(text for text, option in self.left if not option or chosen[option] == untouched[option])
        if lent:
            but = f", but for {left}" if left else ""
            lines = [f"note: {self.source} is drawn again with its own words ({self.program}){but}; -p says others"]
        elif left:
            lines.append(f"note: not followed of {self.source} ({self.program}), so the picture will differ: {left}")
        return "\n".join(lines)

    def damaged(self, key: str, value: Any) -> BadInput:
        return BadInput(f"{self.source}: its parameters are damaged ({key}: {str(value)[:40]!r})")


def plain_name(name: str) -> str:
    """A file's name as it is compared: without folders and suffix, in small letters."""
    base = name.replace("\\", "/").rpartition("/")[2].lower()
    return next((base.removesuffix(suffix) for suffix in WEIGHTS if base.endswith(suffix)), base)


def quoted(value: Any) -> str:
    """A value as a note has it."""
    text = " ".join(str(value).split())
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."
