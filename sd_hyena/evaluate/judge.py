"""Who says whether a picture shows its caption."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from sd_hyena.errors import BadInput


def judge_of(name: str) -> Callable | None:
    """What `module:function` names, None for nothing. Raises BadInput."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"judge={name!r} cannot be imported ({error}); give module:function") from None
