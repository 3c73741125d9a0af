"""Which options have an effect beside which others: what is given in vain is told."""

from __future__ import annotations

import dataclasses
from typing import Any

from sd_hyena.options.growing import in_stages, is_larger, method_of, own_side
from sd_hyena.options.tile import TILED_FROM

TILED_VAE_FROM = 1024  # likewise tiled_vae=auto
LARGER = "and a canvas that is larger than the model's own"
GROWING = {  # what of --grow an option may need, as people are told of it
    "grow:larger": f"--grow METHOD, {LARGER}",
    "grow:stages": f"--grow redraw, diffusehigh or demofusion, {LARGER}",
    "grow:enlarging": f"--grow redraw or diffusehigh, {LARGER}",
}
AUTO_FROM = {"tiled_diffusion": TILED_FROM, "tiled_vae": TILED_VAE_FROM}


def in_vain(config: Any) -> list[str]:
    """A line for each option that differs from its default and `needs` another that is off.

    `a|b`: either of them will do; `a+b`: both are needed; `grow:part` is a part of what that option does.
    """
    lines = []
    for field in dataclasses.fields(config):
        value, needs = getattr(config, field.name), field.metadata["needs"]
        if not needs or value == field.default:
            continue
        missing = [name for name in needs.split("+") if not any(is_on(config, one) for one in name.split("|"))]
        if missing:
            told = " and ".join(" or ".join(map(_told, name.split("|"))) for name in missing)
            lines.append(f"note: {field.name}={value!r} has no effect here, it needs {told}")
    if config.hires and config.grow == "off":
        lines.append(f"note: hires={config.hires:g} has no effect here, it needs --grow auto or redraw")
    return lines


def is_on(config: Any, name: str) -> bool:
    """Whether an option does something, as far as the config tells."""
    if name in GROWING:
        return _grows(config, name)
    value = getattr(config, name)
    if value == "auto":
        return max(config.width, config.height) > AUTO_FROM[name]
    return value is None or value > 1 if name == "cfg_scale" else value not in (None, "", "off", 0)


def _grows(config: Any, part: str) -> bool:
    own = own_side(config.model)
    method = method_of(config, own)
    if part == "grow:larger":
        return method != "off" and is_larger(config, own)
    return in_stages(config, own) and (part == "grow:stages" or method != "demofusion")


def _told(name: str) -> str:
    if name in GROWING:
        return GROWING[name]
    if name in AUTO_FROM:
        return f"--{name} (auto is on above {AUTO_FROM[name]} px)"
    return f"--{name}" + (" above 1" if name == "cfg_scale" else "")
