"""What a model itself is best drawn with: size, steps, guidance, a prompt; told without torch, and without its weights.

    own = own_defaults("models/mine.safetensors")
    own.width, own.height, own.steps, own.cfg_scale

A `generation.json` says it: in a model's folder; of a file NAME.safetensors in the folder NAME beside it, or as
NAME.generation.json. It holds any of the fields of OwnDefaults. What it leaves out comes from the folder's unet/config.json,
from the size that a file notes (modelspec.resolution), and from what the tensors' names say that the model is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from sd_hyena.errors import BadInput
from sd_hyena.files.container import is_safetensors
from sd_hyena.files.pickled_names import pickled_texts
from sd_hyena.files.safetensors_header import notes, tensor_names
from sd_hyena.files.text import decoded
from sd_hyena.files.weights_kind import layout_of_names
from sd_hyena.options.given_path import class_name
from sd_hyena.options.rules import NOISE_LEVELS, at_least, between, check_size, check_text
from sd_hyena.options.shipped import SHIPPED_MODEL

NAME = "generation.json"
SIDES = {"sd15": 512, "sd21": 768, "sdxl": 1024}  # that the layouts were published for
GUIDANCE = {"sdxl": 5.0}  # of the others 7
NOTED = "modelspec.resolution"


@dataclass(frozen=True, kw_only=True)
class OwnDefaults:
    """The options that a GenerateConfig leaves to its model, by their names there; sizes in pixels.

    `prompt` is None where the model brings none: then it is the first line of its prompts.txt.
    """

    allow_huge: ClassVar[bool] = False

    width: int = 512
    height: int = 512
    steps: int = 30
    cfg_scale: float = 7.0
    prompt: str | None = None

    def __post_init__(self):
        check_size(self)
        at_least(self, 1, "steps")
        between(self, 1, NOISE_LEVELS, "steps")
        between(self, 0, 1e3, "cfg_scale")
        check_text(self, "prompt")


KINDS = {"width": int, "height": int, "steps": int, "cfg_scale": (int, float), "prompt": str}


def own_defaults(model: str = "") -> OwnDefaults:
    """Of a diffusers folder or a file, "" is the model that ships. Raises BadInput for a damaged generation.json.

    What cannot be read of a model is as of Stable Diffusion 1.x: whether it can be drawn with is told elsewhere.
    """
    path = Path(model or SHIPPED_MODEL)
    looked_at = [path, *_candidates(path), path / "unet" / "config.json", path / "model_index.json"]
    return _own(path, tuple(stamp for place in looked_at for stamp in _stamp(place)))


def _stamp(path: Path) -> Iterable[tuple[str, int, int]]:
    with suppress(OSError, ValueError):
        seen = path.stat()
        yield str(path), seen.st_size, seen.st_mtime_ns


def _candidates(path: Path) -> list[Path]:
    if path.is_dir():
        return [path / NAME]
    return [path.with_suffix("") / NAME, path.with_name(f"{path.stem}.{NAME}")]


@lru_cache(maxsize=64)
def _own(path: Path, _stamps: tuple) -> OwnDefaults:
    folder, own = path if path.is_dir() else path.with_suffix(""), OwnDefaults()
    if (folder / "model_index.json").is_file():
        own = _of_folder(folder)
    elif path.is_file():
        own = _of_file(path)
    for file in _candidates(path):
        if file.is_file():
            return _noted(own, file)
    return own


def _of_folder(folder: Path) -> OwnDefaults:
    guidance = GUIDANCE["sdxl"] if "XL" in (class_name(folder / "model_index.json") or "") else OwnDefaults.cfg_scale
    with suppress(BadInput, OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        cells = json.loads((folder / "unet" / "config.json").read_text("utf-8"))["sample_size"]
        h, w = cells if isinstance(cells, list) else (cells, cells)
        return OwnDefaults(width=8 * w, height=8 * h, cfg_scale=guidance)
    return OwnDefaults(cfg_scale=guidance)


def _of_file(path: Path) -> OwnDefaults:
    with suppress(BadInput, OSError):
        names = tensor_names(path) if is_safetensors(path) else pickled_texts(path)
        layout = layout_of_names(names)
        side = SIDES.get(layout, OwnDefaults.width)
        own = OwnDefaults(width=side, height=side, cfg_scale=GUIDANCE.get(layout, OwnDefaults.cfg_scale))
        size = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", notes(path).get(NOTED, "") if is_safetensors(path) else "")
        if size and layout:
            with suppress(BadInput):
                return replace(own, width=int(size[1]), height=int(size[2]))
        return own
    return OwnDefaults()


def _noted(own: OwnDefaults, file: Path) -> OwnDefaults:
    try:
        values = json.loads(decoded(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{str(file)!r} cannot be read ({' '.join(str(error).split())[:120]}); mend it or move it away"
        ) from None
    if not isinstance(values, dict):
        raise BadInput(f"{str(file)!r} holds no mapping of {', '.join(KINDS)}; mend it or move it away")
    for name, value in values.items():
        if name not in KINDS:
            raise BadInput(f"{str(file)!r}: unknown option {name[:40]!r}; known are {', '.join(KINDS)}")
        if not _is_of(value, KINDS[name]):
            raise BadInput(f"{str(file)!r}: {name}={str(value)[:40]} must be {_told(KINDS[name])}")
    if "width" in values:
        values = {"height": values["width"]} | values
    if "cfg_scale" in values:
        values["cfg_scale"] = float(values["cfg_scale"])
    try:
        return replace(own, **values)
    except BadInput as error:
        raise BadInput(f"{str(file)!r}: {error}") from None


def _is_of(value: Any, kind: Any) -> bool:
    number = isinstance(value, float) and not math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool) and not number


def _told(kind: Any) -> str:
    return {int: "a whole number", str: "text"}.get(kind, "a number")
