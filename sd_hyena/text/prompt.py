"""The grammar in which people write prompts: A1111's weights, escapes and BREAK."""

from __future__ import annotations

import re
from typing import NamedTuple

ROUND, SQUARE = 1.1, 1 / 1.1  # what a pair of brackets without a number multiplies by
LARGEST_WEIGHT = 1000.0  # so that no nesting overflows, not even in half precision
TOKEN = re.compile(
    r"""
    \\(?P<escaped>[()\[\]\\])
    | (?P<round>\() | (?P<square>\[)
    | :\s*(?P<number>[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))\s*\)
    | (?P<end_round>\)) | (?P<end_square>\])
    | (?P<text>[^\\()\[\]:]+|[\\:])
    """,
    re.VERBOSE,
)
BREAK = re.compile(r"\bBREAK\b")


class Part(NamedTuple):
    """A piece of a prompt and how much it counts."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Part]]:
    r"""The passages between BREAKs, at least one, each as parts of different weights.

    `(word)` multiplies by 1.1, `[word]` divides by it, `(word:1.2)` multiplies by 1.2; brackets nest, and those of one
    kind may overlap those of the other. `\(` is a bracket of the text. A bracket that is never closed reaches to the
    end, one that was never opened is text, and so is a number that is none, as in `(word:nan)`. Every text parses.
    """
    tokens = list(TOKEN.finditer(prompt))
    factors = _factors(tokens)
    passages: list[list[Part]] = [[]]
    products = {"round": [1.0], "square": [1.0]}
    for token, factor in zip(tokens, factors, strict=True):
        kind = _kind(token)
        if factor is None:
            weight = _bounded(products["round"][-1] * products["square"][-1])
            first, *others = [token["escaped"]] if token["escaped"] else BREAK.split(token[0])
            _append(passages[-1], Part(first, weight))
            passages.extend([Part(text, weight)] for text in others)
        elif kind in products:
            products[kind].append(_bounded(products[kind][-1] * factor))
        else:
            products[kind.removeprefix("end_")].pop()
    return [[part for part in passage if part.text] for passage in passages]


def _kind(token: re.Match) -> str:
    return "end_round" if token["number"] else token.lastgroup


def _factors(tokens: list[re.Match]) -> list[float | None]:
    """What each opening bracket multiplies by; some number for what closes it; None for text."""
    factors: list[float | None] = [None] * len(tokens)
    opened: dict[str, list[int]] = {"round": [], "square": []}
    for i, token in enumerate(tokens):
        kind = _kind(token)
        if kind in opened:
            opened[kind].append(i)
            factors[i] = ROUND if kind == "round" else SQUARE
        elif kind.startswith("end_") and (waiting := opened[kind.removeprefix("end_")]):
            start = waiting.pop()
            factors[i] = factors[start] = _bounded(float(token["number"])) if token["number"] else factors[start]
    return factors


def _bounded(weight: float) -> float:
    return max(-LARGEST_WEIGHT, min(LARGEST_WEIGHT, weight))


def _append(passage: list[Part], part: Part) -> None:
    """Parts of one weight are one text, so that words are not cut where brackets were."""
    if passage and passage[-1].weight == part.weight:
        part = Part(passage.pop().text + part.text, part.weight)
    passage.append(part)
