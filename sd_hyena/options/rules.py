"""Rules that options share: each raises BadInput, with the value, the rule and what to do."""

from __future__ import annotations

import math
import secrets
from typing import Literal

from sd_hyena.errors import BadInput

DType = Literal["auto", "float32", "float16", "bfloat16"]
LARGEST_SIDE = 16384
LARGEST_SCALE = 64  # of a picture that is drawn again
ABSURD_SIDE = 1 << 20  # with allow_huge
NOISE_LEVELS = 1000  # that models are trained with: so many steps can be told apart


def check_size(config, *names: str) -> None:
    """Width and height in pixels, or those sides of them that are named."""
    limit = ABSURD_SIDE if config.allow_huge else LARGEST_SIDE
    for name in names or ("width", "height"):
        value = getattr(config, name)
        if not 64 <= value <= limit or value % 8:
            nearest = min(max(64, round(value / 8) * 8), limit)
            raise BadInput(
                f"{name}={value} must be a multiple of 8 from 64 to {limit} pixels; the nearest is {nearest}"
            )


def check_seed(seed: int) -> None:
    if not -1 <= seed < 2**32:
        raise BadInput(f"seed={seed} must be -1 (draw one) or from 0 to {2**32 - 1}")


def drawn_seed(seed: int) -> int:
    """The seed itself, or for -1 one of the machine's choosing."""
    return secrets.randbelow(2**32) if seed == -1 else seed


def at_least(config, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not low <= value <= 10**9:
            raise BadInput(f"{name}={value} must be a whole number from {low} to 10^9")


def between(config, low: float, high: float, name: str, open_low: bool = False, open_high: bool = False) -> None:
    value = getattr(config, name)
    outside = not math.isfinite(value) or value < low or value > high
    if outside or (open_low and value == low) or (open_high and value == high):
        raise BadInput(f"{name}={value} must lie between {low:g} and {high:g}")


def check_text(config, *names: str) -> None:
    """Refuses halves of characters, which no file and no tokenizer takes: a terminal that is not UTF-8."""
    for name in names:
        try:
            (getattr(config, name) or "").encode()
        except UnicodeEncodeError:
            raise BadInput(f"{name}={getattr(config, name)!r} is no Unicode text; write it in UTF-8") from None
