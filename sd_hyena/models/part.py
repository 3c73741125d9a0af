"""A network of a pipeline, filled with tensors that were checked to be all of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput


class Misfit(BadInput):
    """Weights of a network of other layers or sizes."""


def check_state(name: str, expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise Misfit unless `state` has the names and shapes of `expected`, BadInput if its numbers are not finite."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        known = "lacks" if missing else "does not know"
        raise Misfit(f"its {name} {known} {(missing or extra)[0]} (and {len(missing or extra) - 1} more)")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise Misfit(f"its {name} has {key} of {tuple(value.shape)}, not of {tuple(expected[key].shape)}")
    check_numbers(name, state)


def check_numbers(name: str, state: Mapping[str, Tensor]) -> None:
    """Raise BadInput for numbers that are not finite."""
    for key, value in state.items():
        if value.is_meta or not value.numel():  # of the former names and sizes alone are looked at
            continue
        if not value.is_floating_point() or not all(extreme.isfinite() for extreme in value.aminmax()):
            raise BadInput(f"its {name} is damaged: {key} holds NaN, infinities or whole numbers")


def check_loaded(name: str, model: nn.Module, told: Mapping[str, Any]) -> None:
    """The same for a model that diffusers loaded from a folder, given what it tells of its keys."""
    for keys, known in (("missing_keys", "lacks"), ("unexpected_keys", "does not know")):
        if found := sorted(told[keys]):
            raise Misfit(f"its {name} {known} {found[0]} (and {len(found) - 1} more)")
    check_numbers(name, model.state_dict())


def filled(
    kind: Any, config: Mapping[str, Any], name: str, state: Mapping[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """A diffusers model of these weights; nothing is allocated beside them. Raises as check_state."""
    with torch.device("meta"):
        model = kind.from_config(config)
    check_state(name, model.state_dict(), state)
    model.load_state_dict({key: value.to(dtype) for key, value in state.items()}, assign=True)
    return model.eval()
