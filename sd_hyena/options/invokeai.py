"""InvokeAI's metadata: of version 3 and later in `invokeai_metadata`, of version 2 in `sd-metadata`; both JSON."""

from __future__ import annotations

import json
import re
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options.found import Found, quoted

SAMPLERS = {  # with whether its noise levels are Karras'
    "ddim": ("ddim", False),
    "euler": ("euler", False),
    "euler_k": ("euler", True),
    "euler_a": ("euler_a", False),
    "heun": ("heun", False),
    "heun_k": ("heun", True),
    "lms": ("lms", False),
    "lms_k": ("lms", True),
    "pndm": ("pndm", False),
    "plms": ("pndm", False),
    "dpmpp_2m": ("dpm++_2m", False),
    "dpmpp_2m_k": ("dpm++_2m", True),
    "dpmpp_2m_sde": ("dpm++_2m_sde", False),
    "dpmpp_2m_sde_k": ("dpm++_2m_sde", True),
    "unipc": ("unipc", False),
    "unipc_k": ("unipc", True),
    "k_euler": ("euler", False),
    "k_euler_a": ("euler_a", False),
    "k_heun": ("heun", False),
    "k_lms": ("lms", False),
    "k_dpmpp_2": ("dpm++_2m", False),
}
HARMLESS = {
    "app_version", "created_by", "workflow", "canvas_v2_metadata", "ref_images", "generation_mode", "image_uuid", "id",
    "positive_style_prompt", "negative_style_prompt", "clip_skip", "model_hash", "app_id", "extra",
}  # fmt: skip
TEXT_TO_IMAGE = ("txt2img", "sdxl_txt2img", "sd_txt2img", "sd1_txt2img", "sd2_txt2img")
NEUTRAL = {  # what a key has where it does nothing
    "rand_device": "cpu",
    "cfg_rescale_multiplier": 0,
    "hrf_enabled": False,
    "seamless_x": False,
    "seamless_y": False,
    "perlin": 0,
    "threshold": 0,
    "hires_fix": False,
    "seamless": False,
    "type": "txt2img",
    "postprocessing": None,
    "variations": [],
}
COMPEL = re.compile(r"[\w)\"'](\+|-{2})|\)\s*[0-9]*\.[0-9]|\.(swap|blend|and)\(")


def options(text: str, source: str) -> Found:
    """Raises BadInput, as all here do, for what is damaged."""
    found = Found("InvokeAI", source)
    values = _mapping(text, source)
    for key, option, whole in (
        ("steps", "steps", True),
        ("cfg_scale", "cfg_scale", False),
        ("clip_skip", "clip_skip", True),
    ):
        if values.get(key) is not None:
            found.number(option, values.pop(key), key, whole)
    if "clip_skip" in found.options:
        found.options["clip_skip"] += 1  # it counts what is left out
    if values.get("seed") is not None:
        found.seed(values.pop("seed"), "seed")
    if values.get("width") is not None and values.get("height") is not None:
        found.size(values.pop("width"), values.pop("height"))
    _prompts(found, values.pop("positive_prompt", ""), values.pop("negative_prompt", ""))
    for side, ours in (("positive", "prompt"), ("negative", "negative_prompt")):
        style = values.get(f"{side}_style_prompt")
        if style and style != found.options[ours]:
            found.leave(f"a {side} style prompt of its own")
    _sampler(found, values.pop("scheduler", None))
    for option in ("model", "vae"):
        _model(found, option, values.pop(option, None))
    for lora in _list(values.pop("loras", None)):
        _lora(found, lora)
    mode = values.get("generation_mode")
    if isinstance(mode, str) and mode not in TEXT_TO_IMAGE:
        found.leave(f"the picture that it was drawn from ({quoted(mode)}); give --init_image", "init_image")
    if values.pop("strength", None) is not None and "hrf_enabled" not in values and not isinstance(mode, str):
        found.leave("the picture that it was drawn from; give --init_image", "init_image")
    _leave(found, values)
    return found


def options_of_version_2(text: str, source: str) -> Found:
    found = Found("InvokeAI", source)
    whole = _mapping(text, source)
    values = whole.get("image")
    if not isinstance(values, dict):
        raise BadInput(f"{source}: its parameters are damaged (no image in its sd-metadata)")
    values = dict(values)
    prompt = values.pop("prompt", "")
    if isinstance(prompt, list):
        parts = [part for part in prompt if isinstance(part, dict)]
        if len(parts) > 1:
            found.leave("prompts that are mixed")
        prompt = parts[0].get("prompt", "") if parts else ""
    negative = re.findall(r"\[([^\[\]]*)\]", prompt) if isinstance(prompt, str) else []
    prompt = re.sub(r"\s*\[[^\[\]]*\]", "", prompt) if isinstance(prompt, str) else prompt
    _prompts(found, prompt, ", ".join(negative))
    for key, option, count in (("steps", "steps", True), ("cfg_scale", "cfg_scale", False)):
        if values.get(key) is not None:
            found.number(option, values.pop(key), key, count)
    if values.get("seed") is not None:
        found.seed(values.pop("seed"), "seed")
    if values.get("width") is not None and values.get("height") is not None:
        found.size(values.pop("width"), values.pop("height"))
    _sampler(found, values.pop("sampler", None))
    _model(found, "model", whole.get("model_weights"))
    _leave(found, values)
    return found


def _mapping(text: str, source: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{source}: its parameters are damaged ({str(error)[:80]})") from None
    if not isinstance(values, dict):
        raise BadInput(f"{source}: its parameters are damaged (no mapping)")
    return values


def _prompts(found: Found, prompt: Any, negative: Any) -> None:
    for option, text in (("prompt", prompt), ("negative_prompt", negative)):
        if not isinstance(text, str | None):
            raise found.damaged(option, text)
        found.options[option] = text or ""
        if COMPEL.search(text or ""):
            found.leave(f"compel's weights in its {option.replace('_', ' ')}; write (word:1.2)", option)


def _sampler(found: Found, name: Any) -> None:
    if isinstance(name, str) and name in SAMPLERS:
        found.options["scheduler"], found.options["karras"] = SAMPLERS[name]
    elif name is not None:
        found.leave(f"sampler {quoted(name)!r}", "scheduler")


def _model(found: Found, option: str, value: Any) -> None:
    if isinstance(value, dict):
        value = value.get("name") or value.get("model_name") or ""
    if isinstance(value, str):
        found.name(option, value)
    elif value is not None:
        found.leave(f"{option} {quoted(value)!r}", option)


def _lora(found: Found, value: Any) -> None:
    """Appended to the prompt, as A1111 has it."""
    model = value.get("model") or value.get("lora") if isinstance(value, dict) else None
    name = (model.get("name") or model.get("model_name")) if isinstance(model, dict) else None
    if not isinstance(name, str):
        found.leave(f"LoRA {quoted(value)!r}", "lora")
        return
    weight = found.read_number(value.get("weight", 1.0), "weight")
    found.options["prompt"] += f" <lora:{name}:{weight:g}>"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _leave(found: Found, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in HARMLESS or value in (None, [], {}, "") or NEUTRAL.get(key, found) == value:
            continue
        found.leave(f"{key} {quoted(value)}")
