"""A model's networks without their weights: what its configuration says, for counting."""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

from torch import nn

from sd_hyena.models.folder import hollow
from sd_hyena.models.single_file import configuration_of

COUNTING = threading.RLock()  # is held while one of these is called: counting puts other weights into it for the time


def hollow_network(model: Path, name: str) -> nn.Module:
    """The `unet` or `vae` of a model's folder or file, on the meta device. Raises BadInput for a file of no known layout."""
    return _made(configuration_of(model) if model.is_file() else model, name)


@lru_cache(maxsize=4)
def _made(folder: Path, name: str) -> nn.Module:
    return hollow(name, folder / name)
