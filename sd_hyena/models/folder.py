"""A diffusers folder: its parts, and which files of each are read, so that what lies beside them does not matter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import check_weights, shapes_of, stamps
from sd_hyena.models.part import check_state
from sd_hyena.processes.memory import is_out_of_memory

NETWORKS = {  # part -> the class that is known here, and how its files are called
    "unet": ("UNet2DConditionModel", "diffusion_pytorch_model"),
    "vae": ("AutoencoderKL", "diffusion_pytorch_model"),
    "text_encoder": ("CLIPTextModel", "(pytorch_)?model"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "(pytorch_)?model"),
}
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in the middle of an older VAE


@dataclass(frozen=True)
class Stored:
    """The files of a network as diffusers loads them, and what it has to be told for that."""

    files: tuple[Path, ...]
    variant: str | None
    safetensors: bool


def stored(folder: Path, stem: str) -> Stored | None:
    """The weights that are read of a part's folder: plain ones before a variant, fp16 first, safetensors before pickles."""
    name = re.compile(
        rf"{stem}(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<late>\w+))?\.(?P<suffix>safetensors|bin)"
    )
    found: dict[tuple, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := name.fullmatch(path.name):
            variant = match["variant"] or match["late"] or ""
            found.setdefault((variant != "", variant != "fp16", variant, match["suffix"] == "bin"), []).append(path)
    if not found:
        return None
    (_, _, variant, pickled), files = min(found.items())
    return Stored(tuple(files), variant or None, not pickled)


def check_folder(path: Path, without: tuple[str, ...] = ()) -> None:
    """Raise BadInput unless all that loading a pipeline's folder reads is there and whole; reads no numbers.

    `without` are parts that are not read, for they come from elsewhere.
    """
    index = _json(path, "model_index.json")
    for name in parts_of(index):
        if name not in without:
            check_network(path, name, path / name, str(_class_in(index, name)))
            _check_tokenizer(path, name)
    _json(path, "scheduler/scheduler_config.json")


def parts_of(index: Mapping[str, Any]) -> list[str]:
    """The networks of a pipeline."""
    return ["unet", "vae", *sorted(name for name in index if name in NETWORKS and name.startswith("text_encoder"))]


def loaded_files(path: Path) -> list[Path]:
    """All that loading a pipeline's folder reads: the weights, and the configurations and vocabularies. Raises BadInput."""
    parts = parts_of(_json(path, "model_index.json"))
    weights = [stored(path / name, NETWORKS[name][1]) for name in parts]
    folders = [*parts, "scheduler", *(name.replace("text_encoder", "tokenizer") for name in parts if "text" in name)]
    told = [file for name in folders for file in sorted((path / name).glob("*")) if file.suffix in (".json", ".txt")]
    return [path / "model_index.json", *told, *(file for one in weights if one for file in one.files)]


def check_network(model: Path, name: str, folder: Path, kind: str = "") -> None:
    """The same for one of its networks, that is of `kind`."""
    known, stem = NETWORKS[name]
    if kind not in ("", known):
        raise BadInput(f"model {str(model)!r}: its {name} is a {kind[:80]}, known is {known}")
    if (weights := stored(folder, stem)) is None:
        raise BadInput(f"model {str(model)!r} is no whole pipeline: it has no weights in {folder.name}/")
    for file in weights.files:
        check_weights(file)
    config = _json(folder, "config.json")
    if fault := _misfit(name, folder, json.dumps(config), stamps(*weights.files)):
        raise BadInput(f"model {str(model)!r}: {fault}")


@lru_cache(maxsize=32)
def _misfit(name: str, folder: Path, _config: str, files: tuple[tuple[str, int, int], ...]) -> str:
    """What a network's tensors lack, by the sizes that its config says; empty if nothing."""
    try:
        expected = {_short(key): value for key, value in hollow(name, folder).state_dict().items()}
    except Exception as error:  # whatever the libraries stumble over
        return f"{name}/config.json is damaged ({' '.join(str(error).split())[:160]})"
    shapes = {_short(key): shape for file, *_ in files for key, shape in shapes_of(file).items()}
    with torch.device("meta"):
        found = {key: torch.empty(shapes[key]) for key in expected.keys() & shapes.keys()}
    try:
        check_state(name, expected, found)
    except BadInput as error:
        return str(error)
    return ""


def hollow(name: str, folder: Path) -> nn.Module:
    """A network as the config in its folder says, on the meta device."""
    import diffusers
    import transformers

    kind = NETWORKS[name][0]
    with torch.device("meta"):
        if name.startswith("text_encoder"):
            network = getattr(transformers, kind)
            return network(network.config_class.from_pretrained(folder, local_files_only=True))
        network = getattr(diffusers, kind)
        return network.from_config(network.load_config(folder, local_files_only=True))


def _short(name: str) -> str:
    """A tensor's name of today, without the prefix that transformers' versions differ in."""
    old = re.fullmatch(r"(.*mid_block\.attentions\.\d+)\.(query|key|value|proj_attn)\.(\w+)", name)
    return f"{old[1]}.{OLD_NAMES[old[2]]}.{old[3]}" if old else name.removeprefix("text_model.")


def load_network(name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network of a folder that was checked. Raises BadInput."""
    import diffusers
    import transformers

    kind, stem = NETWORKS[name]
    library, weights = transformers if name.startswith("text_encoder") else diffusers, stored(folder, stem)
    try:
        given = dict(variant=weights.variant, use_safetensors=weights.safetensors, local_files_only=True)
        return getattr(library, kind).from_pretrained(folder, dtype=dtype, **given)
    except Exception as error:  # whatever the libraries stumble over
        if is_out_of_memory(error):
            raise
        raise BadInput(f"{str(folder)!r} cannot be loaded ({' '.join(str(error).split())[:200]})") from None


def _check_tokenizer(path: Path, name: str) -> None:
    folder = path / name.replace("text_encoder", "tokenizer")
    if name.startswith("text_encoder") and not any((folder / f).is_file() for f in ("tokenizer.json", "vocab.json")):
        raise BadInput(f"model {str(path)!r} is no whole pipeline: it has no vocabulary in {folder.name}/")


def _class_in(index: Mapping[str, Any], name: str) -> Any:
    entry = index.get(name)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else entry or ""


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text("utf-8"))
        if isinstance(content, dict):
            return content
        reason = "it holds no mapping"
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:160]
    raise BadInput(f"model {str(folder)!r} is no whole pipeline: {name} cannot be read ({reason})")
