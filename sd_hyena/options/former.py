"""Options of the last release that are options of an operator now: accepted for one release, and translated."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from sd_hyena.options.operators import OPERATORS, operator_named
from sd_hyena.processes.group import may_speak

_OF_HYENA2D = ("local", "long", "rank", "reach", "groups", "filter_order", "content", "window", "gates", "norm")
_OF_SEQUENCES = ("emb_dim", "w")
FORMER = {f"hyena2d_{name}": (name, ("hyena2d",)) for name in _OF_HYENA2D}
FORMER |= {f"hyena_{name}": (name, ("bidirectional", "causal", "safari")) for name in _OF_SEQUENCES}
FORMER["landmarks"] = "landmarks", ("hyena2d", "landmarks")


def translated(values: Mapping[str, Any], default_operator: str) -> dict[str, Any]:
    """Options of train.py without the former ones, which win over `operator_options` beside them.

    Those of another operator had no effect and are dropped. Raises BadInput.
    """
    kept = {name: value for name, value in values.items() if name not in FORMER}
    if len(kept) == len(values):
        return kept
    operator = operator_named(kept.get("operator", default_operator))
    given = operator.read(kept.get("operator_options", ""))
    for former, value in values.items():
        name, operators = FORMER.get(former, ("", ()))
        if operator.name in operators:
            given[name] = operator.options[name].check(former, value)
    return kept | {"operator_options": operator.write(given, in_full=True)}


def former_type(name: str) -> type:
    key, (operator, *_) = FORMER[name]
    return type(OPERATORS[operator].options[key].default)


@functools.cache
def note(names: tuple[str, ...], operator_options: str) -> None:
    """Says once what to write instead."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if may_speak():
        print(
            f"note: {shown}: options of the operator, now --operator_options {operator_options or repr('')}; "
            "the old names go with the next release"
        )
