"""What `--help` and `--help_all` say: the options of a config in its groups. Made from the fields alone, so it is quick."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from dataclasses import Field
from typing import Any, Literal

from sd_hyena.options.typed import command_name

WIDTH = 100  # columns
SHORT, ALL = ("-h", "--help"), "--help_all"
ABOUT = "help, and a file of options"


def asked_for(arguments: list[str]) -> str:
    """The flag that asks for help, "" if none does."""
    spelled = (ALL if argument == ALL.replace("p_", "p-") else argument for argument in arguments)
    return next((argument for argument in spelled if argument in (*SHORT, ALL)), "")


def grouped(config_class: type) -> dict[str, list[Field]]:
    """The options by group, in the order in which people ask, the common ones of each first; all in one without a name where
    a config has no groups. Those that it has LEFT_OUT are not told of."""
    names = getattr(config_class, "GROUPS", ("",))
    groups: dict[str, list[Field]] = {name: [] for name in names}
    for field in dataclasses.fields(config_class):
        if field.name in getattr(config_class, "LEFT_OUT", ()):
            continue
        groups[field.metadata["group"] or names[-1]].append(field)
    first = lambda field: not field.metadata["common"]
    return {name: sorted(fields, key=first) for name, fields in groups.items() if fields}


def text(config_class: type, everything: bool, usage: str = "") -> str:
    """The common options, one line each, or all of them with all there is to say.

    A config none of whose options is `common` is short enough to be told at once.
    """
    groups, types = grouped(config_class), typing.get_type_hints(config_class)
    total = sum(map(len, groups.values()))
    common = {name: [f for f in fields if f.metadata["common"]] for name, fields in groups.items()}
    if everything or not any(common.values()):
        common = {}
    shown = {name: fields for name, fields in (common or groups).items() if fields}
    rows = {
        name: [(_flags(f, types[f.name]), _said(f, types[f.name], not common)) for f in fields]
        for name, fields in shown.items()
    }
    rows[ABOUT] = [("-h, --help", "the common options" if common else "this text")]
    if common:
        rows[ABOUT].append((f"    {ALL}", f"all {total}, in the same groups, with all that there is to say"))
    rows[ABOUT] += [
        ("    --config FILE", "YAML of any options; flags win over it"),
        ("    --print_config", "write such a file"),
    ]
    column = 4 + max(len(flags) for group in rows.values() for flags, _ in group)
    lines = [
        f"usage: {usage or command_name()} [options]",
        "",
        *textwrap.wrap(" ".join((config_class.__doc__ or "").split()), WIDTH),
    ]
    for name, group in rows.items():
        lines += ["", *([name] if name else [])]
        for flags, said in group:
            lead = f"  {flags}".ljust(column)
            lines += textwrap.wrap(said, WIDTH, initial_indent=lead, subsequent_indent=" " * column) or [lead]
    end = getattr(config_class, "epilog", str)() if not common else ""
    return "\n".join([*lines, *(["", end] if end else [])]) + "\n"


def _flags(field: Field, kind: Any) -> str:
    """-m, --model PATH; a long one stands in the column of the long ones."""
    short = [flag for flag in field.metadata["flags"] if not flag.startswith("--")]
    long = [f"--{field.name}", *(flag for flag in field.metadata["flags"] if flag.startswith("--"))]
    given = "".join(f"{flag}, " for flag in short) or " " * 4
    value = {bool: "", int: " N", float: " X"}.get(_plain(kind), " PATH" if field.metadata["path"] else " WORD")
    return f"{given}{', '.join(long)}{value}"


def _said(field: Field, kind: Any, in_full: bool) -> str:
    """The help, up to the first semicolon if not in full, and the default where it says something."""
    said = field.metadata["help"] if in_full else field.metadata["help"].partition("; ")[0]
    if in_full and typing.get_origin(kind) is Literal:
        said += f"; one of {', '.join(typing.get_args(kind))}"
    if (shown := field.metadata["shown"]) is not None:
        return f"{said} [{shown}]" if shown else said
    if field.default in (None, "") or isinstance(field.default, bool):
        return said + (f"; --no_{field.name} turns it off" if field.default is True else "")
    return f"{said} [{field.default}]"


def _plain(kind: Any) -> Any:
    """The type of which a value is, None put aside."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    return parts[0] if parts and typing.get_origin(kind) is not Literal else kind
