"""Options behind one flag, `key=value,key=value`: read strictly, written shortly."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sd_hyena.errors import BadInput

Value = bool | int | float | str
AUTO = re.compile(r"auto(?::([1-9]\d{0,5}))?")


def auto_price(value: Any, default: Value) -> int | None:
    """The number at whose price `auto` or `auto:NUMBER` deals out; None for any other value."""
    found = AUTO.fullmatch(value) if isinstance(value, str) else None
    return found and int(found[1] or default)


@dataclass(frozen=True)
class Option:
    """One of them, of its default's type."""

    default: Value
    help: str = ""
    choices: tuple[str, ...] = ()
    low: int | None = None  # the least, of numbers
    auto: bool = False  # whether it may be left to the training: auto, or auto:NUMBER

    def check(self, name: str, value: Any) -> Value:
        """The value itself. Raises BadInput for what is of another type or out of bounds."""
        kind = type(self.default)
        if self.auto and auto_price(value, self.default):
            return value
        if kind is float and type(value) is int:
            value = float(value)
        wrong = type(value) is not kind or (self.choices and value not in self.choices)
        if kind in (int, float) and not wrong:
            wrong = not math.isfinite(value) or abs(value) > 10**9 or (self.low is not None and value < self.low)
        if wrong:
            raise BadInput(f"{name}={repr(value)[:80]} must be {self.rule()}")
        return value

    def read(self, name: str, text: str) -> Value:
        """What a text says. Raises BadInput."""
        kind = type(self.default)
        if self.auto and auto_price(text, self.default):
            return text
        try:
            value = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise BadInput(f"{name}={text[:80]!r} must be {self.rule()}") from None
        return self.check(name, value)

    def rule(self) -> str:
        if self.choices:
            return " or ".join((", ".join(self.choices[:-1]), self.choices[-1]))
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        rule = kinds[type(self.default)] + (f" from {self.low} to 10^9" if self.low is not None else "")
        return f"{rule}, or auto, or auto:NUMBER" if self.auto else rule


def read(
    text: str, known: Mapping[str, Option], flag: str, owner: str, told: Callable[[str], str] = lambda _: ""
) -> dict[str, Value]:
    """What a text says of the options that an `owner` knows; `told` may say more of a name. Raises BadInput."""
    given: dict[str, Value] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            wrong = f"{name[:80]!r} is not of the form key=value"
        elif name in given:
            wrong = f"{name} is given twice"
        elif name in known:
            given[name] = known[name].read(name, value)
            continue
        else:
            wrong = told(name) or f"{owner} has no {name[:80]!r}; it has {', '.join(known) or 'no options'}"
        raise BadInput(f"{flag}={text[:160]!r}: {wrong}")
    return given


def write(given: Mapping[str, Value], known: Mapping[str, Option], in_full: bool = False) -> str:
    """The text that `read` understands as these options: the shortest, or with every default, which a later release may
    have changed."""
    values = {name: option.default for name, option in known.items()} | given
    shown = {name: values[name] for name, option in known.items() if in_full or values[name] != option.default}
    return ",".join(f"{name}={said(value)}" for name, value in shown.items())


def said(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def listed(known: Mapping[str, Option]) -> list[str]:
    """A line each, for `--help_all`."""
    lines = []
    for name, option in known.items():
        allowed = f" ({', '.join(option.choices)})" if option.choices else ""
        lines.append(f"      {f'{name}={said(option.default)}':<19}{option.help}{allowed}".rstrip())
    return lines
