"""Whether a picture grows: which configs ask for more than their model draws by itself."""

from __future__ import annotations

import math
from typing import Any

from sd_hyena.options.own_defaults import own_defaults
from sd_hyena.options.tile import is_cut

STAGED = ("redraw", "diffusehigh", "demofusion")  # of --grow: those that draw the picture again, larger
WHOLE = ("deep_shrink", "hidiffusion")  # those that compose the canvas in one piece
MOST = 2.0  # times the model's own side that these compose where tiles would cut more: it is then drawn again, larger
AUTO = "redraw"  # the best by `python -m benchmarks grow`
FROM = 1.5  # times the side of the model's own square


def own_side(model: str) -> int:
    """Pixels of a side of the square that a model draws by itself. Raises BadInput."""
    own = own_defaults(model)
    return round(math.sqrt(own.width * own.height))


def method_of(config: Any, own: int) -> str:
    """The method by which a config's picture grows on a model of `own` pixels a side; off if it does not."""
    if config.hires and config.grow != "off":
        return "redraw"
    if config.grow != "auto":
        return config.grow
    return AUTO if times(config, own) > FROM and not (config.init_image or config.regions) else "off"


def times(config: Any, own: int) -> float:
    """How many times the side of the model's own square the canvas has: of equal areas 1."""
    return math.sqrt(config.width * config.height) / own


def in_stages(config: Any, own: int) -> bool:
    """Whether a picture is drawn, and then drawn again, larger."""
    method = method_of(config, own)
    if method in WHOLE:
        return times(config, own) > MOST and is_cut(config)
    return method != "off" and is_larger(config, own)


def is_larger(config: Any, own: int) -> bool:
    """Whether the canvas is larger than what the model draws by itself."""
    return bool(config.hires or times(config, own) > 1)
