"""What the gate alone tries (`.ci/run`): beside it stands a neighbour in the daily suite that fails for the same mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def gated(values: Iterable[Any]) -> list:
    """Values of a parametrize for the gate alone; a tuple is one value of several arguments."""
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.gate) for v in values]


def sampled(values: Iterable[Any], every: int) -> list:
    """Each `every`th of the values for the daily suite, from the first on, and the others for the gate."""
    return [value if n % every == 0 else gated([value])[0] for n, value in enumerate(values)]
