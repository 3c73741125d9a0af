"""A1111's `parameters`: the text in a PNG that says how it was generated; written for others, read from others."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options.sampler import SAMPLERS

NUMBERS = {
    "Steps": ("steps", int),
    "CFG scale": ("cfg_scale", float),
    "Seed": ("seed", int),
    "Clip skip": ("clip_skip", int),
}
AUTOMATIC = {"dpm++_2m": "Karras", "dpm++_2m_sde": "Exponential"}  # what A1111 then takes, elsewhere the model's own
VALUE = re.compile(r'\s*("(?:\\.|[^\\"])*"|[^,]*)')
NEGATIVE = "Negative prompt:"
KARRAS = " Karras"


def parameters(config: dict[str, Any], model: str, model_hash: str, students: str = "") -> str:
    """The generation as A1111 writes it: prompt, negative prompt, one line of `key: value` pairs."""
    pairs = {
        "Steps": config["steps"],
        "Sampler": SAMPLERS[config["scheduler"]].a1111 + KARRAS * config["karras"],
        "CFG scale": f"{config['cfg_scale']:g}",
        "Seed": config["seed"],
        "Size": f"{config['width']}x{config['height'] or config['width']}",
        "Model hash": model_hash[:10],
        "Model": model,
    }
    if config["clip_skip"] != 1:
        pairs["Clip skip"] = config["clip_skip"]
    if students:
        pairs["Hyena"] = students
    lines = [config["prompt"] or ""]
    if config["negative_prompt"]:
        lines.append(f"{NEGATIVE} {config['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())])


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def options(text: str, source: str) -> tuple[dict[str, Any], list[str]]:
    """The options of generate.py that such a text has, and what of it we cannot do. Other keys are left alone.

    Raises BadInput, which names `source`, for a text that is none or is damaged.
    """
    *lines, last = text.strip().split("\n")
    pairs = _pairs(last)
    if "Steps" not in pairs:
        raise BadInput(f"{source}: its parameters are damaged or none of A1111's (no Steps in their last line)")
    found: dict[str, Any] = {name: "\n".join(part) for name, part in _prompts(lines).items()}
    for key, (name, kind) in NUMBERS.items():
        if key in pairs:
            found[name] = _number(pairs[key], kind, key, source)
    if "Size" in pairs:
        if not (size := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", pairs["Size"])):
            raise BadInput(f"{source}: its parameters are damaged (Size: {pairs['Size'][:40]!r})")
        found |= {"width": int(size[1]), "height": int(size[2])}
    sampling, unknown = _sampling(pairs.get("Sampler", ""), pairs.get("Schedule type", ""))
    return found | sampling, unknown


def _prompts(lines: list[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"prompt": [], "negative_prompt": []}
    name = "prompt"
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            name, line = "negative_prompt", line.removeprefix(NEGATIVE).strip()
        parts[name].append(line)
    return parts


def _pairs(line: str) -> dict[str, str]:
    """`key: value, key: value`; a value with a comma in it is quoted as in JSON."""
    pairs, position = {}, 0
    while (colon := line.find(":", position)) >= 0:
        key = line[position:colon].rpartition(",")[2].strip()
        value = VALUE.match(line, colon + 1)
        pairs[key], position = _unquoted(value[1]), value.end()
    return pairs


def _unquoted(value: str) -> str:
    if value.startswith('"'):
        with suppress(ValueError):
            return json.loads(value)
    return value.strip()


def _number(text: str, kind: type, key: str, source: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise BadInput(f"{source}: its parameters are damaged ({key}: {text[:40]!r})") from None


def _sampling(sampler: str, schedule: str) -> tuple[dict[str, Any], list[str]]:
    """Our options for a sampler, whose noise levels older versions name behind it and newer ones by themselves."""
    plain = sampler.removesuffix(KARRAS)
    ours = {known.a1111: name for name, known in SAMPLERS.items()}.get(plain)
    if ours is None:
        return {}, [f"sampler {sampler[:40]!r}"] if sampler else []
    schedule = "Karras" if plain != sampler else AUTOMATIC.get(ours, "") if schedule == "Automatic" else schedule
    if schedule == "Karras" and not SAMPLERS[ours].karras:
        return {"scheduler": ours, "karras": False}, [f"Karras' noise levels for {ours}"]
    unknown = schedule not in ("", "Karras", "Uniform")
    return {"scheduler": ours, "karras": schedule == "Karras"}, [f"schedule {schedule[:40]!r}"] if unknown else []
