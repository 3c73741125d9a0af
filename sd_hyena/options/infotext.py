"""A1111's `parameters`: the text in a picture that says how it was made; written for others, read from others.

Its forks write it too (Forge, SD.Next), and so do sites (Civitai) and other programs.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from sd_hyena.errors import BadInput
from sd_hyena.options import infotext_hires
from sd_hyena.options.found import Found, quoted
from sd_hyena.options.infotext_keys import family, is_harmless
from sd_hyena.options.sampler import SAMPLERS

NUMBERS = {
    "Steps": ("steps", True),
    "CFG scale": ("cfg_scale", False),
    "Clip skip": ("clip_skip", True),
}
AUTOMATIC = {"dpm++_2m": "Karras", "dpm++_2m_sde": "Exponential"}  # what A1111 then takes, elsewhere the model's own
PLAIN = re.compile(r"[^,\n]*")
STRING = re.compile(r'"(?:\\.|[^\\"])*"', re.DOTALL)
FIRST = re.compile(r"^[ \t]*Steps:[ \t]*[0-9]", re.MULTILINE)  # of the line of pairs
BEHIND = re.compile(r"\s*(Negative )?Template:")  # what Dynamic Prompts writes behind it
HASH = re.compile(r"\s*([^:,]+?)\s*:\s*([0-9a-fA-F]{6,})\s*")
MODEL_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
NEGATIVE = "Negative prompt:"
KARRAS = " Karras"
LONGEST_BLOCK = 100_000  # characters of Tiled Diffusion's; 64 regions with prompts are a fifth of it
TRUE = ("True", "true", "1")
METHODS = {"MultiDiffusion": "multidiffusion", "Mixture of Diffusers": "mixture", "SpotDiffusion": "spot"}
TILES = {  # of Tiled Diffusion's block
    "Tile tile width": "tile_width",
    "Tile tile height": "tile_height",
    "Tile Overlap": "overlap",
    "Tile batch size": "tile_batch_size",
}
INVERSION = {
    "NoiseInv Steps": ("noise_inversion", True),
    "NoiseInv Retouch": ("retouch", False),
    "NoiseInv Renoise strength": ("renoise_strength", False),
    "NoiseInv Kernel size": ("renoise_kernel", True),
}
FORGE_TILES = {  # of its built-in tiles, in pixels
    "multidiffusion_tile_width": "tile_width",
    "multidiffusion_tile_height": "tile_height",
    "multidiffusion_tile_overlap": "overlap",
}
HYPERTILE = {  # with what A1111 takes where a key is missing
    "Hypertile U-Net max tile size": ("hypertile", 256),
    "Hypertile U-Net swap size": ("hypertile_swap", 3),
    "Hypertile U-Net max depth": ("hypertile_depth", 3),
}


class UsedLora(NamedTuple):
    """A LoRA that a picture was drawn with; `hash` as A1111 takes it (files/hashes.py), or empty."""

    path: Path
    weight: float
    hash: str = ""


def parameters(
    config: dict[str, Any],
    model: str,
    model_hash: str,
    students: str = "",
    loras: Sequence[UsedLora] = (),
    vae_hash: str = "",
) -> str:
    """The generation as A1111 writes it: prompt, negative prompt, one line of `key: value` pairs."""
    pairs = {
        "Steps": config["steps"],
        "Sampler": SAMPLERS[config["scheduler"]].a1111 + KARRAS * config["karras"],
        "CFG scale": f"{config['cfg_scale']:g}",
        "Seed": config["seed"],
        "Size": f"{config['width']}x{config['height'] or config['width']}",
        "Model hash": model_hash[:10],
        "Model": _stem(model),
    }
    if config["vae"]:
        pairs |= {"VAE hash": vae_hash[:10]} if vae_hash else {}
        pairs["VAE"] = Path(config["vae"]).name
    if config["init_image"]:
        pairs["Denoising strength"] = f"{config['strength']:g}"
        pairs |= {"Upscaler": Path(config["upscaler"]).stem} if config["upscaler"] else {}
    pairs |= infotext_hires.written(config)
    if config["clip_skip"] != 1:
        pairs["Clip skip"] = config["clip_skip"]
    if known := [f"{lora.path.stem}: {lora.hash[:12]}" for lora in loras if lora.hash]:
        pairs["Lora hashes"] = ", ".join(known)
    if students:
        pairs["Hyena"] = students
    pairs["RNG"] = "CPU"  # draws the noise, here as there
    tags = "".join(f" <lora:{lora.path.stem}:{lora.weight:g}>" for lora in loras)
    lines = [(config["prompt"] or "") + tags]
    if config["negative_prompt"]:
        lines.append(f"{NEGATIVE} {config['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())])


def _stem(model: str) -> str:
    """A folder's name may have dots; only the suffix of a file of weights is none of it."""
    return Path(model).stem if Path(model).suffix.lower() in MODEL_FILES else model


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text


def options(text: str, source: str) -> Found:
    """What such a text says. Raises BadInput, which names `source`, for one that is none or is damaged."""
    found = Found("A1111", source)
    lines, pairs = _split(text, found)
    if "Steps" not in pairs:
        raise BadInput(f"{source}: its parameters are damaged or none of A1111's (no Steps in their last line)")
    found.options |= {name: "\n".join(part) for name, part in _prompts(lines).items()}
    for key, (name, whole) in NUMBERS.items():
        if key in pairs:
            found.number(name, pairs.pop(key), key, whole)
    if "Seed" in pairs:
        found.seed(pairs.pop("Seed"))
    if "Size" in pairs:
        if not (size := re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", pairs["Size"])):
            raise found.damaged("Size", pairs["Size"])
        del pairs["Size"]
        found.size(*size.groups())
    _sampling(found, pairs.pop("Sampler", ""), pairs.pop("Schedule type", ""))
    _files(found, pairs)
    _tiles(found, pairs)
    _hypertile(found, pairs)
    _start(found, pairs)
    if pairs.pop("RNG", "GPU") != "CPU":
        found.leave("noise of a GPU (no RNG: CPU)")
    _leave(found, pairs)
    return found


def _split(text: str, found: Found) -> tuple[list[str], dict[str, str]]:
    """The prompts' lines, and the pairs behind them: from the last line that begins with Steps on, else of the last line."""
    text = text.strip()
    starts = [match.start() for match in FIRST.finditer(text)]
    start = starts[-1] if starts else text.rfind("\n") + 1
    pairs, end = _pairs(text, start)
    behind = text[end:].strip()
    if behind and not BEHIND.match(text[end:]):
        found.leave(f"what stands behind its parameters ({quoted(behind)!r})")
    return text[:start].rstrip("\n").split("\n") if start else [""], pairs


def _prompts(lines: list[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {"prompt": [], "negative_prompt": []}
    name = "prompt"
    for line in map(str.strip, lines):
        if line.startswith(NEGATIVE):
            name, line = "negative_prompt", line.removeprefix(NEGATIVE).strip()
        parts[name].append(line)
    return parts


def _pairs(text: str, start: int) -> tuple[dict[str, str], int]:
    """`key: value, key: value` from `start` on, and where its line ends. A value with a comma or a line break in it is
    quoted as in JSON, or is JSON itself."""
    pairs: dict[str, str] = {}
    while True:
        line_end = text.find("\n", start)
        line_end = len(text) if line_end < 0 else line_end
        colon = text.find(":", start, line_end)
        if colon < 0:
            return pairs, line_end
        key = text[start:colon].rpartition(",")[2].strip()
        value, start = _value(text, colon + 1)
        pairs[key] = value


def _value(text: str, start: int) -> tuple[str, int]:
    while text[start : start + 1] in (" ", "\t"):
        start += 1
    if string := STRING.match(text, start):
        with suppress(ValueError):
            return str(json.loads(string[0], strict=False)), string.end()
    if text[start : start + 1] in ("{", "["):  # Civitai's
        with suppress(ValueError, RecursionError):
            end = json.JSONDecoder(strict=False).raw_decode(text, start)[1]
            return text[start:end], end
    plain = PLAIN.match(text, start)
    return plain[0].strip(), plain.end()


def _sampling(found: Found, sampler: str, schedule: str) -> None:
    """Our options for a sampler, whose noise levels older versions name behind it and newer ones by themselves."""
    plain = sampler.removesuffix(KARRAS)
    ours = {known.a1111: name for name, known in SAMPLERS.items()}.get(plain)
    if ours is None:
        if sampler:
            found.leave(f"sampler {quoted(sampler)!r}", "scheduler")
        return
    schedule = "Karras" if plain != sampler else AUTOMATIC.get(ours, "") if schedule == "Automatic" else schedule
    karras = schedule == "Karras" and SAMPLERS[ours].karras
    found.options |= {"scheduler": ours, "karras": karras}
    if schedule == "Karras" and not karras:
        found.leave(f"Karras' noise levels for {ours}", "scheduler")
    elif schedule not in ("", "Karras", "Uniform", "Normal"):
        found.leave(f"schedule {quoted(schedule)!r}", "karras")


def _files(found: Found, pairs: dict[str, str]) -> None:
    """The model, the VAE and the embeddings, by their names; LoRAs stand in the prompt."""
    found.name("model", pairs.pop("Model", ""), pairs.get("Model hash", ""))
    if (vae := pairs.pop("VAE", "")) not in ("", "None", "Automatic"):
        found.name("vae", vae, pairs.get("VAE hash", ""))
    for name, hash_ in HASH.findall(pairs.pop("TI hashes", "")):
        found.name("embeddings", name, hash_)
    for name, hash_ in HASH.findall(pairs.get("Lora hashes", "")):
        found.name("lora", name, hash_)
    if hypernet := pairs.pop("Hypernet", ""):
        pairs.pop("Hypernet strength", None)
        found.leave(f"hypernetwork {quoted(hypernet)!r}")


def _tiles(found: Found, pairs: dict[str, str]) -> None:
    """Tiled Diffusion's block, a mapping as Python prints it, and Forge's keys for the same."""
    if (block := pairs.pop("Tiled Diffusion", None)) is not None:
        values = tiled_diffusion_block(block)
        if values is None:
            raise found.damaged("Tiled Diffusion", block)
        _tiled_diffusion(found, values)
    if pairs.pop("multidiffusion_enabled", "") in TRUE:
        _method(found, pairs.pop("multidiffusion_method", "MultiDiffusion"))
        for key, option in FORGE_TILES.items():
            if key in pairs:
                found.options[option] = found.read_number(pairs.pop(key), key, whole=True) // 8
        if "multidiffusion_tile_batch_size" in pairs:
            key = "multidiffusion_tile_batch_size"
            found.number("tile_batch_size", pairs.pop(key), key, whole=True)
        _limit_overlap(found)


def tiled_diffusion_block(block: str) -> dict[str, Any] | None:
    """The values of such a block; None if it is damaged, or longer than any block is."""
    if len(block) > LONGEST_BLOCK:
        return None
    try:
        values = ast.literal_eval(block)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return None
    return values if isinstance(values, dict) and all(isinstance(key, str) for key in values) else None


def region_control(text: str) -> dict[str, Any]:
    """The regions of Tiled Diffusion's block in such a text, by name; empty if there are none. Raises BadInput."""
    _, pairs = _split(text, Found("A1111", "its regions"))
    regions = (tiled_diffusion_block(pairs.get("Tiled Diffusion", "")) or {}).get("Region control")
    return regions if isinstance(regions, dict) else {}


def _tiled_diffusion(found: Found, values: dict[str, Any]) -> None:
    _method(found, str(values.pop("Method", "MultiDiffusion")))
    for key, option in TILES.items():
        if key in values:
            found.number(option, values.pop(key), key, whole=True)
    _limit_overlap(found)
    inverting = bool(values.pop("NoiseInv", False))
    for key, (option, whole) in INVERSION.items():
        if key in values:
            value = found.read_number(values.pop(key), key, whole)
            found.beside |= {option: value} if inverting else {}
    if inverting:
        found.leave("noise inversion of another picture; give it as --init_image", "init_image")
    if "Region control" in values:
        found.options["regions"] = found.source
        del values["Region control"]
    for key in ("Upscaler", "Upscale factor", "Keep input size"):
        values.pop(key, None)  # of the picture to start from, which is named by its strength
    for key, value in values.items():
        found.leave(f"Tiled Diffusion's {key} {quoted(value)}")


def _method(found: Found, method: str) -> None:
    if method not in METHODS:
        found.leave(f"tiles by {quoted(method)!r}", "tiled_diffusion")
        return
    found.options["tiled_diffusion"] = METHODS[method]
    if method == "MultiDiffusion":
        found.options["tile_weights"] = "uniform"  # which its tiles have


def _limit_overlap(found: Found) -> None:
    """As Tiled Diffusion does with an overlap that is as long as a tile."""
    side = min(found.options.get("tile_width", 96), found.options.get("tile_height", 96))
    if found.options.get("overlap", 0) >= side:
        found.options["overlap"] = max(0, side - 4)


def _hypertile(found: Found, pairs: dict[str, str]) -> None:
    if pairs.pop("Hypertile U-Net", "") not in TRUE:
        return
    for key, (option, default) in HYPERTILE.items():
        found.number(option, pairs.pop(key, default), key, whole=True)


def _start(found: Found, pairs: dict[str, str]) -> None:
    """The second pass; of one that is not followed, or of a picture to start from, what is told: never the picture."""
    if infotext_hires.read(found, pairs):
        return
    strength = pairs.pop("Denoising strength", None)
    if any(key.startswith("Hires ") for key in pairs):
        way = "draw it, then again from it with --init_image, -W, -H and --strength " + (strength or "0.7")
        found.leave(f"{_told(pairs, 'Hires')}: {way}", "init_image")
        for key in [key for key in pairs if family(key) == "Hires"]:
            del pairs[key]
    elif strength is not None:
        found.beside["strength"] = found.read_number(strength, "Denoising strength")
        found.leave(
            f"the picture that it was drawn from (Denoising strength {quoted(strength)}); give --init_image",
            "init_image",
        )


def _leave(found: Found, pairs: dict[str, str]) -> None:
    """Name what is left of the pairs and changes pixels, what belongs together once."""
    pairs = {key: value for key, value in pairs.items() if key and not is_harmless(key, value)}
    for name in dict.fromkeys(map(family, pairs)):
        found.leave(_told(pairs, name))


def _told(pairs: dict[str, str], name: str) -> str:
    own = {key.removeprefix(name).strip("_ "): quoted(value) for key, value in pairs.items() if family(key) == name}
    if list(own) == [""]:
        return f"{name} {own['']}"
    return f"{name} ({', '.join(' '.join(filter(None, pair)) for pair in own.items())})"
