"""A1111's hires fix in its `parameters`: the first pass has the picture's `Size`, the second is so many times as large."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sd_hyena.options import given_path
from sd_hyena.options.found import Found, plain_name, quoted

SCALE, SIZE, STEPS, UPSCALER = "Hires upscale", "Hires resize", "Hires steps", "Hires upscaler"
STRENGTH = "Denoising strength"
OURS = ("Lanczos", "None", "")  # upscalers that are ours, or say nothing
LARGEST = 16


def written(config: dict[str, Any]) -> dict[str, Any]:
    """The pairs of a config that has `hires`, as A1111 names them; of any other none."""
    if not config.get("hires") or config.get("grow") == "off":
        return {}
    strength = config["grow_strength"]
    return {
        STRENGTH: f"{strength:g}",
        SCALE: f"{config['hires']:g}",
        STEPS: config["grow_steps"] or int(config["steps"] * strength),
        UPSCALER: Path(config["upscaler"]).stem if config.get("upscaler") else "Lanczos",
    }


def read(found: Found, pairs: dict[str, str]) -> bool:
    """Take the pairs out that are followed; False if there is no second pass that can be. Raises BadInput.

    A picture to start from takes the first pass's place, and there is no second.
    """
    scale = _scale(found, pairs)
    if not 1 < scale <= LARGEST:
        return False
    for key in (SCALE, SIZE):
        pairs.pop(key, None)
    strength = found.read_number(pairs.pop(STRENGTH, "0.7"), STRENGTH)
    found.options |= {"hires": float(scale), "grow": "auto", "grow_strength": strength}
    found.beside |= {"hires": 0.0, "grow": "off", "grow_strength": 0.0, "grow_steps": 0, "strength": strength}
    steps = found.read_number(pairs.pop(STEPS, 0), STEPS, whole=True)
    found.options["grow_steps"] = steps or found.options.get("steps", 0)
    upscaler = pairs.pop(UPSCALER, "")
    if upscaler not in OURS:
        found.name("upscaler", upscaler)
    return True


def upscaler_beside(found: Found, chosen: dict[str, Any], untouched: dict[str, Any]) -> dict[str, str]:
    """The option `upscaler`, if a file of the name that the picture has lies beside the model; else it is left."""
    names = [name for name, _ in found.names.get("upscaler", ())]
    if not names or chosen["upscaler"] != untouched["upscaler"]:
        return {}
    known = {plain_name(name): path for name, path in given_path.beside(chosen["model"], "upscalers").items()}
    if plain_name(names[0]) in known:
        return {"upscaler": str(known[plain_name(names[0])])}
    found.leave(
        f"{UPSCALER} {quoted(names[0])!r}; give --upscaler, or lay it in upscalers/ beside the model, else Lanczos takes its "
        "place",
        "upscaler",
    )
    return {}


def _scale(found: Found, pairs: dict[str, str]) -> float:
    if SCALE in pairs:
        return found.read_number(pairs[SCALE], SCALE)
    size = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", pairs.get(SIZE, ""))
    width, height = found.options.get("width", 0), found.options.get("height", 0)
    if not size or not width or not height:
        return 0
    wide, high = (int(side) for side in size.groups())
    return wide / width if abs(wide * height - high * width) < 8 * max(width, height) else 0
