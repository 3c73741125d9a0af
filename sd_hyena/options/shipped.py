"""Where what ships with the program lies: beside the code, as a package installs it, or in a copy of the repository."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def shipped(*places: str) -> Path:
    """The first of these that is there, seen from the package; the last one if none is."""
    return next((path for place in places if (path := PACKAGE / place).exists()), PACKAGE / places[-1])


SHIPPED_MODEL = shipped("tiny_sd/model", "../examples/tiny_sd/model").resolve()
SHIPPED_JUDGE = (
    f"{'sd_hyena' if find_spec('sd_hyena.tiny_sd') else 'examples'}.tiny_sd.checker:is_right"  # of its pictures
)
CONFIGS = shipped("configs", "../configs").resolve()


def shipped_file(given: str) -> str:
    """A path as it is; where there is no such file but one that ships is called so (configs/...), that one's."""
    ours = CONFIGS.parent / given
    return str(ours) if given.startswith("configs/") and not os.path.exists(given) and ours.is_file() else given
