"""What other programs' prompts say beside words: networks in angle brackets, editing, alternation, AND, wildcards.

A LoRA by name is done; what is not done is refused with the way out, so that none of it is drawn as words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from sd_hyena.errors import BadInput

NETWORK = re.compile(r"<([A-Za-z]\w*):([^<>\n]*)>")
LORAS = ("lora", "lyco", "locon", "loha")
NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)\s*")
LARGEST = 1000.0
AND = re.compile(r"\bAND\b")
WILDCARD = re.compile(r"(?<!\w)__(?=[^\s_])[^,\n]*?[^\s_]__(?!\w)")
VARIANT = re.compile(r"\{[^{}]*(?:\||\$\$)[^{}]*\}|\$\{[^{}]*\}")
BRACKETS = re.compile(r"\\.|[()\[\]|:]", re.DOTALL)
CLOSES = {")": "(", "]": "["}


class NamedLora(NamedTuple):
    """A LoRA that a prompt calls by name, with its weight."""

    name: str
    weight: float


@dataclass(frozen=True)
class Construct:
    """A piece of a prompt that is no text, what it asks for, and what to do instead."""

    piece: str
    what: str
    instead: str

    def __str__(self) -> str:
        piece = " ".join(self.piece.split())
        piece = piece if len(piece) <= 60 else f"{piece[:60]}..."
        return f"{piece!r} {self.what}, which is not done here; {self.instead}"


def check_constructs(config, *names: str) -> None:
    """Refuse what would be drawn as words but is none, other than LoRAs by name. Raises BadInput."""
    for name in names:
        check_text_of(getattr(config, name) or "", name)


def check_text_of(text: str, name: str) -> None:
    """The same of a text, which an error calls `name`."""
    without, _ = without_loras(text, name)
    if found := next(constructs(without), None):
        raise BadInput(f"{name}: {found}")


def without_loras(text: str, name: str) -> tuple[str, list[NamedLora]]:
    """A prompt without its <lora:NAME:WEIGHT>, and these. Raises BadInput for one that cannot be read."""
    found = []

    def take(match: re.Match) -> str:
        if match[1].lower() not in LORAS:
            return match[0]
        found.append(_lora(match, name))
        return "\0"

    rest = NETWORK.sub(take, text)
    return (re.sub(r"[ \t]*\0", "", rest).strip(" ") if found else text), found


def _lora(match: re.Match, name: str) -> NamedLora:
    """NAME, NAME:WEIGHT, NAME:TEXT:UNET, NAME:te=WEIGHT:unet=WEIGHT."""
    called, *rest = match[2].split(":")
    weights = []
    for part in rest:
        key, equals, value = part.rpartition("=")
        if (equals and key.strip() not in ("te", "unet", "w")) or not NUMBER.fullmatch(value):
            raise BadInput(f"{name}: {match[0]!r} has {part!r}, which is not done here; write <lora:NAME:WEIGHT>")
        weights.append(float(value))
    if not called.strip() or not all(abs(weight) <= LARGEST for weight in weights):
        raise BadInput(f"{name}: {match[0]!r} has no name or a weight beyond {LARGEST:g}; write <lora:NAME:WEIGHT>")
    if len(set(weights)) > 1:
        raise BadInput(
            f"{name}: {match[0]!r} has one weight for the text encoder and another for the UNet, which is not done here; "
            f"write <lora:{called}:{weights[-1]:g}>"
        )
    return NamedLora(called.strip(), weights[0] if weights else 1.0)


def constructs(text: str):
    """What of a prompt is no text, other than weights, BREAK and LoRAs, as Constructs."""
    for match in NETWORK.finditer(text):
        if match[1].lower() in LORAS:
            yield Construct(match[0], "asks for a LoRA", "give it with --lora")
        elif match[1].lower() in ("hypernet", "hypernetwork"):
            yield Construct(match[0], "asks for a hypernetwork", "take it out of the prompt")
        else:
            yield Construct(
                match[0], "asks for something outside of the prompt", "take it out, or put a space behind <"
            )
    if match := AND.search(text):
        way = "draw each part as a region (--regions), or write `and`"
        yield Construct(text[max(0, match.start() - 12) : match.end() + 12], "composes prompts with AND", way)
    for match in WILDCARD.finditer(text):
        yield Construct(match[0], "is a wildcard", "write one of its lines")
    for match in VARIANT.finditer(text):
        yield Construct(match[0], "chooses at random", "write one of its parts")
    yield from _brackets(text)


def _brackets(text: str):
    """`[from:to:when]`, `[to:when]`, `[from::when]` and `[a|b]`: what stands directly between two square brackets."""
    opened: list[tuple[str, int, list[re.Match]]] = []  # bracket, its place, the | and : directly in it
    for match in BRACKETS.finditer(text):
        sign = match[0]
        if sign in "([":
            opened.append((sign, match.start(), []))
        elif sign in "|:" and opened:
            opened[-1][2].append(match)
        elif sign in CLOSES and opened and opened[-1][0] == CLOSES[sign]:
            _, start, inside = opened.pop()
            piece = text[start : match.end()]
            if sign == "]" and any(one[0] == "|" for one in inside):
                yield Construct(
                    piece, "alternates between prompts in every step", r"write one of its parts, or \[ for a bracket"
                )
            elif sign == "]" and inside and NUMBER.fullmatch(text, inside[-1].end(), match.start()):
                way = r"write one of its parts, (word:1.2) for a weight, or \[ for a bracket"
                yield Construct(piece, "changes the prompt while the picture is drawn", way)
