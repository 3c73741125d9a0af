"""The options that a picture holds, whichever program wrote it: ours, A1111 and its forks, ComfyUI, InvokeAI."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.picture import metadata_of
from sd_hyena.files.picture_text import read_texts
from sd_hyena.options import comfyui, infotext, invokeai
from sd_hyena.options.found import Found, plain_name

OURS_ALONE = (
    "out_dir",
    "grid",
    "from_image",
    "debug",
    "lora_dir",
    "model_dir",
    "vae_dir",
    "embedding_dir",
)  # of a machine
READERS: dict[str, Callable[[str, str], Found]] = {  # by the name of their text; the first that is there is read
    "parameters": infotext.options,
    "invokeai_metadata": invokeai.options,
    "sd-metadata": invokeai.options_of_version_2,
    "prompt": comfyui.options,
}
OTHERS = {  # texts that tell of a program whose parameters are not read
    "fooocus_scheme": "Fooocus",
    "Dream": "InvokeAI 1",
    "workflow": "ComfyUI, without the values that it was drawn with",
    "invokeai_graph": "InvokeAI, without its parameters",
    "sui_image_params": "SwarmUI",
    "negative_prompt": "Easy Diffusion",
}
OTHERS_IN_JSON = {"sui_image_params": "SwarmUI", "fooocus_version": "Fooocus", "metadata_scheme": "Fooocus"}


def read(path: str, option: str = "from_image") -> Found:
    """What it says. Of our own pictures everything but where to write. Raises BadInput, which names the `option`."""
    source = f"{option}={path!r}"
    texts = read_texts(path)
    if metadata := metadata_of(texts, path):
        return _own(metadata, path, source, texts.get("parameters", ""))
    for name, reader in READERS.items():
        if text := texts.get(name, "").strip():
            if program := _other(texts, text):
                break
            found = reader(text, source)
            if found.options.get("regions") == source:  # they are in the picture
                found.options["regions"] = path
            found.options["num_images"] = 1
            found.options.setdefault("grow", "off")  # for whoever drew it did what it says
            return found
    else:
        program = next((program for name, program in OTHERS.items() if name in texts), "")
    program = program or ("NovelAI" if texts.get("Software") == "NovelAI" else "")
    if program:
        raise BadInput(f"{source} was made by {program}; that is not read, give -p, -s, -W, -H, -k and --scheduler")
    raise BadInput(f"{source} holds no options; give a picture of generate.py, A1111, ComfyUI or InvokeAI")


def _own(metadata: dict[str, Any], path: str, source: str, parameters: str) -> Found:
    stored = metadata.get("config")
    if not isinstance(stored, dict):
        raise BadInput(f"{source} holds no options; give it as written by generate.py or A1111")
    if metadata.get("regions"):  # they travel in the picture, whatever became of their file
        stored = stored | {"regions": path}
    stored = {"grow": "off"} | stored  # those of before there was such an option
    if stored.get("init_image") and "resize" not in stored:  # of a version that drew the start in the canvas's shape
        stored = {"resize": "stretch"} | stored | {"height": stored.get("height") or stored.get("width", 512)}
    options = {name: value for name, value in stored.items() if name not in OURS_ALONE}
    return Found("sd_hyena", source, options, hashes=_hashes(metadata, options, parameters, source))


def _hashes(
    metadata: dict[str, Any], options: dict[str, Any], parameters: str, source: str
) -> dict[tuple[str, str], str]:
    """What is noted of the files that a picture of ours was made with: beside its options, and as A1111 has it."""
    found: dict[tuple[str, str], str] = {}
    with suppress(BadInput):
        for option, files in infotext.options(parameters, source).names.items() if parameters else ():
            found |= {(option, plain_name(name)): hash_ for name, hash_ in files if hash_}
    if isinstance(hash_ := metadata.get("model_sha256"), str) and isinstance(model := options.get("model"), str):
        found["model", plain_name(model)] = hash_
    return found


def _other(texts: dict[str, str], text: str) -> str:
    """The program that wrote JSON where A1111 has its parameters; empty for none that is known."""
    if "parameters" not in texts or not text.startswith("{"):
        return ""
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return next((program for key, program in OTHERS_IN_JSON.items() if key in keys), "") or (
        "Fooocus" if "fooocus_scheme" in texts else ""
    )
