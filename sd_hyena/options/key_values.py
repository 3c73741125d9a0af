"""Options behind one flag, `key=value,key=value`: read strictly, written shortly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sd_hyena.errors import BadInput

if TYPE_CHECKING:
    from sd_hyena.options.operators import Option, Value


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
