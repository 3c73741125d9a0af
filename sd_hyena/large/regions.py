"""Regions: rectangles of the picture with a prompt of their own; their file format, text and noise."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.mask import read_mask
from sd_hyena.files.picture import metadata_of
from sd_hyena.files.picture_text import read_texts
from sd_hyena.files.text import decoded
from sd_hyena.large.adapters import acting
from sd_hyena.large.tiling import Rect, Size, add, feather
from sd_hyena.options import infotext
from sd_hyena.options.prompt_constructs import check_constructs, without_loras
from sd_hyena.options.rules import check_text
from sd_hyena.processes.ranks import say

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LARGEST_FILE = 1 << 20  # bytes of a region file
ROUNDING = 0.005  # by how much a region may reach over the canvas: files hold rounded numbers
DEFAULTS = {"x": 0.4, "y": 0.4, "w": 0.2, "h": 0.2}  # what Tiled Diffusion takes for a key that is missing
NUMBERS = {"x": (0, 1), "y": (0, 1), "w": (0, 1), "h": (0, 1), "feather_ratio": (0, 1), "guidance_scale": (1, 1000)}


@dataclass(frozen=True, kw_only=True)
class Region:
    """A rectangle of the canvas, in fractions of its width and height, and what it shows. Raises BadInput.

    Its prompts are appended to the picture's. A background region takes part in the average as a tile does; a
    foreground region covers what lies below, with a feathered edge. `mask`, a grey image, is laid over the rectangle
    and says how much of the region counts where. `adapters` are the LoRAs active in it, by name; None leaves those of
    the picture, () is none. With a `seed` its initial noise does not depend on the picture's seed.
    """

    x: float
    y: float
    w: float
    h: float
    prompt: str = ""
    negative_prompt: str = ""
    blend_mode: Literal["background", "foreground"] = "background"
    feather_ratio: float = 0.2
    seed: int | None = None
    enable: bool = True
    guidance_scale: float | None = None
    adapters: tuple[str, ...] | None = None
    mask: str = ""

    def __post_init__(self):
        for name, (low, high) in NUMBERS.items():
            value = getattr(self, name)
            if (value is not None or name != "guidance_scale") and not _is_number(value, low, high):
                raise BadInput(f"{name}={value!r} of a region is no number from {low} to {high}")
        for start, length in (("x", "w"), ("y", "h")):
            a, b = getattr(self, start), getattr(self, length)
            if a >= 1 or b <= 0 or a + b > 1 + ROUNDING:
                raise BadInput(
                    f"a region with {start}={a:g} {length}={b:g} is off the canvas; "
                    f"{start} and {length} are fractions of it, {start} + {length} at most 1"
                )
        for name in ("prompt", "negative_prompt", "mask"):
            if not isinstance(getattr(self, name), str):
                raise BadInput(f"{name}={getattr(self, name)!r} of a region is no text")
        check_text(self, "prompt", "negative_prompt")
        check_constructs(self, "prompt", "negative_prompt")
        for name in ("prompt", "negative_prompt"):
            if called := without_loras(getattr(self, name), name)[1]:
                raise BadInput(
                    f'{name} of a region asks for the LoRA {called[0].name!r}; name it under "adapters" and give its file '
                    "with --lora"
                )
        if self.blend_mode not in ("background", "foreground"):
            raise BadInput(f"blend_mode={self.blend_mode!r} of a region is unknown; use background or foreground")
        if not isinstance(self.enable, bool):
            raise BadInput(f"enable={self.enable!r} of a region is neither true nor false")
        if self.seed is not None and not (_is_number(self.seed, 0, 2**63) and isinstance(self.seed, int)):
            raise BadInput(f"seed={self.seed!r} of a region is no whole number from 0; leave it out for the picture's")
        if self.adapters is not None:
            if not isinstance(self.adapters, list | tuple) or not all(isinstance(name, str) for name in self.adapters):
                raise BadInput(f"adapters={self.adapters!r} of a region is no list of LoRA names")
            object.__setattr__(self, "adapters", tuple(self.adapters))

    def rect(self, canvas: Size) -> Rect:
        """Its cells on a canvas (H, W)."""
        return Rect.of_fractions(self.x, self.y, self.w, self.h, canvas)

    def opacity(self, canvas: Size) -> Tensor:
        """How much its cells count, (h, w) in 0 ... 1: the mask, in the foreground times the feathered edge."""
        rect = self.rect(canvas)
        edge = torch.ones(rect.height, rect.width)
        if self.blend_mode == "foreground":
            edge = feather(rect, canvas, self.feather_ratio)
        return edge * _read_mask(self.mask, rect) if self.mask else edge


def _is_number(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _read_mask(path: str, rect: Rect) -> Tensor:
    try:
        grey = read_mask(path)[0].resize((rect.width, rect.height), Image.Resampling.BOX)
    except BadInput as error:
        raise BadInput(f"mask of a region: {error}") from None
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(rect.height, rect.width) / 255


# The file format is Tiled Diffusion's, {"bbox_controls": [...]}; keys that it does not have are written only when set.
KEYS = {field.name: field.name for field in fields(Region)} | {"negative_prompt": "neg_prompt"}
OURS = ("guidance_scale", "adapters", "mask")


def to_dict(regions: Sequence[Region]) -> dict[str, Any]:
    """Regions as plain values: what goes into a region file and into the PNG."""
    controls = []
    for region in regions:
        control = {KEYS[name]: value for name, value in vars(region).items() if name not in OURS or value}
        control |= {"blend_mode": region.blend_mode.capitalize(), "seed": -1 if region.seed is None else region.seed}
        if region.adapters is not None:
            control["adapters"] = list(region.adapters)
        controls.append(control)
    return {"bbox_controls": controls}


def from_dict(data: Any, source: str = "regions") -> tuple[Region, ...]:
    """The regions of such a dict. Raises BadInput, which names `source` and the region's number."""
    controls = data.get("bbox_controls") if isinstance(data, dict) else None
    if not isinstance(controls, list):
        raise BadInput(f'{source} has no list bbox_controls; write {{"bbox_controls": [{{"x": 0, ...}}]}}')
    regions = (_region(control, f"{source}, region {number}") for number, control in enumerate(controls, start=1))
    return tuple(region for region in regions if region is not None)


def _region(control: Any, source: str) -> Region | None:
    """By the rules of Tiled Diffusion's loader, with a line for what it does in silence: what is missing has a default,
    what reaches over the border is clipped, what is disabled or off the canvas is passed over, as a strange key is.
    """
    if not isinstance(control, dict):
        raise BadInput(f"{source}: {control!r} is no mapping")
    names = {key: name for name, key in KEYS.items()}
    if strange := [str(key) for key in control if key not in names]:
        say(f"note: {source}: what {', '.join(strange)[:80]!r} means is not known, passed over")
    values = {names[key]: value for key, value in control.items() if key in names and value is not None}
    values["enable"] = bool(values.get("enable", True))
    for name in sorted(DEFAULTS.keys() - values.keys()):
        values[name] = DEFAULTS[name]
        if values["enable"]:
            say(f"note: {source}: {name} is missing, {values[name]} as Tiled Diffusion has it")
    if isinstance(values.get("blend_mode"), str):
        values["blend_mode"] = values["blend_mode"].lower()
    if type(seed := values.get("seed")) is float and seed.is_integer():  # as its number field writes them
        values["seed"] = int(seed)
    if values.get("seed") == -1:
        del values["seed"]
    if all(_is_number(values[name], -1e6, 1e6) for name in DEFAULTS) and not _clip(values, source):
        return None
    ratio = values.get("feather_ratio", 0)
    values |= (
        {"feather_ratio": min(max(ratio, 0.0), 1.0)} if _is_number(ratio, -1e6, 1e6) and not 0 <= ratio <= 1 else {}
    )
    try:
        return Region(**values)
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from None


def _clip(values: dict[str, Any], source: str) -> bool:
    """Put a rectangle inside the canvas; False, with a line if it was enabled, where nothing of it is left."""
    x, y, w, h = (values[name] for name in DEFAULTS)
    left, top = max(x, 0), max(y, 0)
    width, height = min(w, 1 - left), min(h, 1 - top)
    if width <= 0 or height <= 0:
        if values["enable"]:
            say(f"note: {source} with x={x:g} y={y:g} w={w:g} h={h:g} covers nothing, passed over")
        return False
    if (values["enable"] and (left, top) != (x, y)) or max(w - width, h - height) > ROUNDING:
        say(f"note: {source} reaches over the border, clipped to x={left:g} y={top:g} w={width:g} h={height:g}")
        values |= {"x": left, "y": top, "w": width, "h": height}
    return True


def read_regions(path: str | Path) -> tuple[Region, ...]:
    """The regions of a JSON file, or of a picture that was made with some, here or by Tiled Diffusion. Raises BadInput."""
    source = repr(str(path))
    if Path(path).suffix.lower() in PICTURES:
        texts = read_texts(path)
        if "regions" in (metadata := metadata_of(texts, path)):
            return from_dict(metadata["regions"], source)
        if block := infotext.region_control(texts.get("parameters", "")):
            return from_dict({"bbox_controls": list(block.values())}, source)
        raise BadInput(f"{source} holds no regions; give a picture that was made with some, or a JSON file")
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise BadInput(f"{source} is larger than {LARGEST_FILE} bytes; that is no file of regions")
        data = json.loads(decoded(text))
    except OSError as error:
        raise BadInput(f"{source} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{source} is no valid JSON ({str(error)[:120]})") from None
    return from_dict(data, source)


def write_regions(path: str | Path, regions: Sequence[Region]) -> None:
    """Write a JSON file that Tiled Diffusion reads too, all or nothing."""
    with replacing(Path(path)) as temporary:
        Path(temporary).write_text(json.dumps(to_dict(regions), indent=2, ensure_ascii=False) + "\n", "utf-8")


def with_noise(noise: Tensor, regions: Sequence[Region], sigma: float = 1.0) -> Tensor:
    """Noise of deviation `sigma` (B, C, H, W) with that of the seeded regions in its place, the same for all B images.

    Background first, foreground over it. Where k regions of a layer overlap, their noises' sum is divided by √k, so
    every cell keeps unit variance. (Averaging, as Tiled Diffusion does, would lower it.)
    """
    canvas = tuple(noise.shape[-2:])
    for layer in ("background", "foreground"):
        total, count = torch.zeros(1, *noise.shape[1:]), torch.zeros(canvas)
        for region in regions:
            if region.blend_mode == layer and region.seed is not None:
                rect, source = region.rect(canvas), torch.Generator().manual_seed(region.seed)
                add(total, rect, torch.randn(1, noise.shape[1], *rect[2:], generator=source))
                add(count, rect, torch.ones(rect[2:]))
        total = (total * sigma / count.clamp(min=1).sqrt()).to(noise)
        noise = torch.where(count.to(noise.device) > 0, total, noise)
    return noise


class Noise:
    """The seeded regions' noise, wherever the pipeline starts from noise or adds it."""

    def __init__(self, pipe: Any, regions: Sequence[Region]):
        self._pipe, self._regions, self._added = pipe, regions, False
        self._prepare, self._add = pipe.prepare_latents, pipe.scheduler.add_noise
        self._signature = inspect.signature(pipe.prepare_latents)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Stands in for the scheduler's `add_noise` (img2img, inpainting)."""
        self._added = True
        return self._add(original_samples, with_noise(noise, self._regions), timesteps)

    def prepare_latents(self, *args, **kwargs) -> Any:
        """Stands in for the pipeline's `prepare_latents`: pure noise, unless noise was added to a picture."""
        self._added = not self._signature.bind(*args, **kwargs).arguments.get("add_noise", True)  # SDXL's refiner
        result = self._prepare(*args, **kwargs)
        if self._added:
            return result
        latents = result[0] if isinstance(result, tuple) else result
        latents = with_noise(latents, self._regions, self._pipe.scheduler.init_noise_sigma)
        return (latents, *result[1:]) if isinstance(result, tuple) else latents


class Texts:
    """The text embeddings of regions: whenever the pipeline encodes its prompt, theirs are encoded in the same way, each
    with the LoRAs that act on the text encoders in it."""

    def __init__(self, encode_prompt: Any, regions: Sequence[Region], encoders: Sequence[nn.Module] = ()):
        self._encode, self._signature = encode_prompt, inspect.signature(encode_prompt)
        self._regions, self._encoders = regions, encoders
        self._main: tuple[Tensor | None, ...] = ()
        self._own: dict[Region, tuple[Tensor | None, ...]] = {}

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        """Stands in for the pipeline's `encode_prompt`."""
        given = self._signature.bind(*args, **kwargs).arguments
        for region in self._regions:
            with acting(self._encoders, region.adapters):
                self._own[region] = self._encode(**_appended(given, region))
        self._main = self._encode(*args, **kwargs)
        return self._main

    def length(self, region: Region) -> int:
        """How many tokens the region's text has, with padding; 0 while nothing was encoded."""
        return self._own[region][0].shape[1] if region in self._own else 0

    def roles(self, text: Tensor) -> list[int]:
        """What the equal parts of a batch of embeddings are: 0 the prompt, 1 the negative prompt.

        Found by comparison, for pipelines order them differently: [negative, positive] under classifier-free guidance,
        [positive] without, [negative, positive, positive] with perturbed attention.
        """
        if not self._main:
            raise BadInput("regions need the pipeline's own prompt; call the pipeline that tiled_diffusion was given")
        images, found = len(self._main[0]), []
        parts = text.split(images)
        for part in parts:
            order = (1, 0) if not found and len(parts) > 1 else (0, 1)  # an empty prompt may equal the negative one
            role = next((r for r in order if _same(part, self._main[r])), None)
            if role is None:
                raise BadInput("regions cannot follow text embeddings that are changed while the picture is drawn")
            found.append(role)
        return found

    def of(self, region: Region, arguments: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a UNet or ControlNet with the region's text, and SDXL's pooled text, instead of the picture's."""
        roles, own = self.roles(arguments["encoder_hidden_states"]), self._own[region]
        arguments = arguments | {"encoder_hidden_states": torch.cat([own[role] for role in roles])}
        added = arguments.get("added_cond_kwargs") or {}
        if "text_embeds" in added:
            pooled = torch.cat([own[2 + role] for role in roles])
            arguments["added_cond_kwargs"] = added | {"text_embeds": pooled}
        return arguments


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)


def _appended(given: dict[str, Any], region: Region) -> dict[str, Any]:
    """Arguments of `encode_prompt` for a region. To embeddings nothing can be appended: there its own prompt is all."""
    texts = {name: value for name, value in given.items() if not name.endswith("prompt_embeds")}
    if texts.get("prompt") is None:
        texts["prompt"] = [""] * len(given["prompt_embeds"])
    negative = region.negative_prompt or given.get("negative_prompt_embeds") is not None
    if negative and texts.get("negative_prompt") is None:
        texts["negative_prompt"] = "" if isinstance(texts["prompt"], str) else [""] * len(texts["prompt"])
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        if texts.get(name) is not None:
            texts[name] = _joined(texts[name], region.negative_prompt if "negative" in name else region.prompt)
    return texts


def _joined(main: str | list[str], addition: str) -> str | list[str]:
    if isinstance(main, list):
        return [_joined(one, addition) for one in main]
    return ", ".join(filter(None, (main, addition)))
