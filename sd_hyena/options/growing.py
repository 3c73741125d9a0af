"""Whether a picture grows: which configs ask for more than their model draws by itself."""

from __future__ import annotations

import math
from typing import Any

from sd_hyena.options.own_defaults import own_defaults

AUTO = "redraw"  # the best by `python -m benchmarks grow`
FROM = 1.5  # times the side of the model's own square


def own_side(model: str) -> int:
    """Pixels of a side of the square that a model draws by itself. Raises BadInput."""
    own = own_defaults(model)
    return round(math.sqrt(own.width * own.height))


def method_of(config: Any, own: int) -> str:
    """The method by which a config's picture grows on a model of `own` pixels a side; off if it does not."""
    if config.hires:
        return "redraw"
    if config.grow != "auto":
        return config.grow
    large = math.sqrt(config.width * config.height) > FROM * own
    return AUTO if large and not (config.init_image or config.regions) else "off"
