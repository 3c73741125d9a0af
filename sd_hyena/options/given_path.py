"""What options name on disk, told without torch: whether it is there, of a form that is read, of the right kind.

A bare name is looked up beside the model: NAME in students/, vae/, loras/, embeddings/ or upscalers/ of the folder that the model's
folder or file lies in. A path that exists wins over a name. What takes tensors to tell is told where they are read.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.files.container import PICKLED, SAFETENSORS, check_packed, is_safetensors
from sd_hyena.files.safetensors_header import tensor_names
from sd_hyena.files.weights_kind import LORA, MODEL, NOTHING_KNOWN, UPSCALER, VAE, Kind, is_controlnet, kind_of
from sd_hyena.options.landmarks import WORD, Landmarks
from sd_hyena.options.shipped import SHIPPED_MODEL

PIPELINES = {  # of a model_index.json: the one that draws with these weights from nothing
    "StableDiffusionPipeline": "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline": "StableDiffusionXLPipeline",
}
MODELS = (
    "give a diffusers folder (with model_index.json), a .safetensors or a .ckpt file of Stable Diffusion 1.x, 2.x, SDXL"
)
VAES = "give a diffusers folder, a .safetensors or a .ckpt file of an AutoencoderKL"
CONTROLNETS = "give a diffusers folder of a ControlNetModel, a .safetensors or a .pth file of a ControlNet"
RUNS = "give auto, a run (OUT_DIR/RUN) or one of its checkpoints (OUT_DIR/RUN/checkpoints/step-....ckpt)"
LARGEST_WEIGHT = 100  # of a LoRA; sliders go to ten and more
EMBEDDINGS = (".pt", ".pth", ".bin", ".safetensors", ".sft")
BESIDE = {  # the folders beside a model -> endings of what is known there by its name; the first wins
    "students": (".safetensors", ".pt"),
    "vae": (*SAFETENSORS, *PICKLED, ""),
    "loras": (*SAFETENSORS, *PICKLED),
    "embeddings": EMBEDDINGS,
    "upscalers": (*SAFETENSORS, *PICKLED),
}
SEPARATORS = {
    "students": ",+",
    "vae": "",
    "loras": ",",
    "embeddings": ",",
    "upscalers": "",
}  # of the names in the value of an option


def beside(model: str, kind: str) -> dict[str, Path]:
    """What can be named beside a model ("" is the one that ships): by name, with its ending and without."""
    folder = Path(os.path.abspath(model or SHIPPED_MODEL)).parent / kind
    names: dict[str, Path] = {}
    for ending in BESIDE[kind] if folder.is_dir() else ():
        for path in sorted(folder.glob(f"*{ending}")):
            if path.is_file() if ending else path.is_dir():
                names |= {name: path for name in (path.name, path.stem) if name not in names}
    return names


def located(given: str, option: str, model: str, kind: str) -> str:
    """The value of an option with each name beside the model as its path. Raises BadInput, with the names there are."""
    known = beside(model, kind)

    def path(name: str) -> str:
        if os.path.exists(name) or not known:
            return name
        bare = os.path.basename(name) == name and not Landmarks.read(name)
        if name not in known and bare:
            names = ", ".join(sorted({path.stem for path in known.values()}))
            raise BadInput(f"{option}={name!r} is no file; of that kind there are beside the model: {names}")
        return str(known.get(name, name))

    return _renamed(given, kind, path, lambda name: os.path.exists(name) or name in known)


def named(given: str, model: str, kind: str) -> str:
    """The other way: each path that `located` answers as the name it has beside the model."""
    names = {str(path): path.stem for path in beside(model, kind).values()}
    return _renamed(given, kind, lambda path: names.get(path, path), os.path.exists)


def renamed(given: str, kind: str, rename: Callable[[str], str]) -> str:
    """The value of an option of that kind with each of its paths as `rename` has it."""
    return _renamed(given, kind, rename, os.path.exists)


def _renamed(given: str, kind: str, rename: Callable[[str], str], there: Callable[[str], bool]) -> str:
    """The value with its names renamed; a LoRA's weight stays behind its name."""
    pieces, changed = [], False
    for separator, entry in _names(given, SEPARATORS[kind], lambda entry: there(_weighted(entry, there)[0])):
        name, weight = _weighted(entry, there) if kind == "loras" else (entry, "")
        new = rename(name) if name else name
        changed |= new != name
        pieces += [separator, new + weight]
    return "".join(pieces) if changed else given


def _weighted(entry: str, there: Callable[[str], bool]) -> tuple[str, str]:
    """A name and the `:weight` behind it, empty if the whole is there or ends in no number."""
    name, _, number = entry.rpartition(":")
    if name and not there(entry):
        with suppress(ValueError):  # C:\lora.safetensors
            float(number)
            return name, f":{number}"
    return entry, ""


def plain_file(given: str, option: str) -> Path:
    """Raises BadInput, as all here do, with one line that names the option, its value and the rule."""
    if not os.path.isfile(given):
        raise BadInput(f"{option}={given!r} is no file")
    return Path(given)


def model(given: str, option: str = "model") -> Path:
    """A folder with the index of a pipeline that is known, or a file that is not of another kind."""
    if not os.path.exists(given):
        raise BadInput(f"model {given!r} does not exist; {MODELS}")
    path = Path(given)
    if path.is_file():
        if path.stat().st_size == 0:
            raise BadInput(f"model {given!r} is an empty file; {MODELS}")
        if (kind := _kind(path, MODEL)) is not MODEL:
            raise BadInput(f"model {given!r} looks like {kind}")
        return path
    index = path / "model_index.json"
    if not index.is_file():
        raise BadInput(f"model {given!r} has no model_index.json; {MODELS}")
    name = class_name(index)
    if name is None:
        raise BadInput(f"model {given!r}: model_index.json is damaged; {MODELS}")
    if name not in PIPELINES:
        raise BadInput(f"model {given!r} looks like a {name}; known are {', '.join(PIPELINES)}")
    return path


def vae(given: str, option: str = "vae") -> Path:
    """A folder of an AutoencoderKL, or a file that is not of another kind."""
    if os.path.isdir(given):
        return _folder(given, option, "AutoencoderKL", VAES)
    if not os.path.isfile(given):
        raise BadInput(f"{option}={given!r} does not exist; {VAES}")
    if (kind := _kind(Path(given), VAE)) is not VAE:
        raise BadInput(f"{option}={given!r} looks like {kind}")
    return Path(given)


def students(given: str, option: str) -> list[Path]:
    """All files of a+b,c."""
    names = [name for together in alternatives(given) for name in together]
    for name in names:
        if not os.path.isfile(name) and not Landmarks.read(name):
            raise BadInput(f"{option}={name!r} is no file; training writes out/hyena.pt, {WORD} needs no file")
    return [Path(name) for name in names]


def alternatives(given: str) -> list[list[str]]:
    """The names of a+b,c: those used together, for each alternative."""
    found: list[list[str]] = [[]]
    for separator, name in _names(given, ",+"):
        if separator == ",":
            found.append([])
        found[-1] += [name] if name else []
    return [together for together in found if together]


def loras(given: str, option: str = "lora") -> list[tuple[Path, float]]:
    """FILE or FILE:WEIGHT, separated by commas."""
    found = []
    for entry in several(given, lambda name: os.path.isfile(_weighted(name, os.path.isfile)[0])):
        path, weight = _weighted(entry, os.path.isfile)
        if not os.path.isfile(path):
            raise BadInput(f"{option}={entry!r} is no file; give FILE.safetensors or FILE.safetensors:WEIGHT")
        strength = float(weight[1:]) if weight else 1.0
        if not abs(strength) <= LARGEST_WEIGHT:
            raise BadInput(f"{option}={entry!r}: the weight must lie between -{LARGEST_WEIGHT} and {LARGEST_WEIGHT}")
        kind = _kind(Path(path), LORA)
        if kind not in (LORA, NOTHING_KNOWN):  # what is unknown here, its reader may know
            raise BadInput(f"{option}={path!r} looks like {kind}")
        found.append((Path(path), strength))
    return found


def controlnets(given: str, option: str = "controlnet") -> list[Path]:
    """Folders of ControlNetModels and files that may be some, separated by commas."""
    return [_controlnet(name, option) for name in several(given)]


def _controlnet(given: str, option: str) -> Path:
    if not os.path.isfile(given):
        return _folder(given, option, "ControlNetModel", CONTROLNETS)
    path = Path(given)
    check_packed(path, "a .safetensors or .pth file")
    if is_safetensors(path) and not is_controlnet(names := tensor_names(path)):
        raise BadInput(f"{option}={given!r} looks like {kind_of(names)}")
    return path


def upscaler(given: str, option: str = "upscaler") -> Path:
    """A file that is not of another kind; what its network is takes spandrel to tell."""
    path = plain_file(given, option)
    try:
        kind = _kind(path, UPSCALER)
    except BadInput as error:
        raise BadInput(f"{option}: {error}") from None
    if kind not in (UPSCALER, NOTHING_KNOWN, VAE):  # a restorer of faces has a VAE's names: it is told by itself
        raise BadInput(f"{option}={given!r} looks like {kind}")
    return path


def pictures(given: str, option: str) -> list[Path]:
    """Files separated by commas; whether they are pictures is told where they are read."""
    return [plain_file(name, option) for name in several(given)]


def several(given: str, there: Callable[[str], bool] = os.path.exists) -> list[str]:
    """The entries between commas; what is `there` with commas in its name is one entry."""
    return [name for _, name in _names(given, ",", there) if name]


def embeddings(given: str, option: str = "embeddings") -> list[tuple[Path, bool]]:
    """Files, and all below folders, separated by commas; with each whether it was named itself."""
    found: list[tuple[Path, bool]] = []
    for entry in several(given):
        if os.path.isdir(entry):
            found += [(file, False) for file in _below(Path(entry)) if file.suffix.lower() in EMBEDDINGS]
        elif os.path.isfile(entry) and Path(entry).suffix.lower() in EMBEDDINGS:
            found.append((Path(entry), True))
        else:
            raise BadInput(f"{option}={entry!r} is no folder and no file that ends in {', '.join(EMBEDDINGS)}")
    return found


def _below(place: Path) -> Iterable[Path]:
    """All files below a folder but for hidden ones, which are other programs' debris."""
    for file in sorted(place.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(place).parts):
            yield file


def folder(given: str, option: str) -> None:
    """A folder that is there, or could be made; nothing is made."""
    place = Path(given)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if os.path.exists(place):  # a loop of links, a name too long: told where the folder is made
        reason = None if place.is_dir() else "Not a directory"
        reason = reason or (None if os.access(place, os.W_OK | os.X_OK) else "Permission denied")
        if reason:
            raise BadInput(f"{option}={given!r} cannot be written to ({reason}); name a folder you own")


def folders(given: str, option: str) -> list[Path]:
    """Folders that are there, separated by commas."""
    for name in several(given):
        if not os.path.isdir(name):
            raise BadInput(f"{option}={name!r} is no folder")
    return [Path(name) for name in several(given)]


def run(given: str, option: str = "resume") -> None:
    """auto, or what may be a run or a checkpoint."""
    if given != "auto" and not os.path.exists(given):
        raise BadInput(f"{option}={given!r} is no checkpoint in a run's folder; {RUNS}")


def class_name(path: Path) -> str | None:
    """Which class of diffusers a JSON file is of; None where it does not say."""
    try:
        name = json.loads(path.read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _names(given: str, separators: str, there: Callable[[str], bool] = os.path.exists) -> list[tuple[str, str]]:
    """Each name and the separator before it; of names that hold separators themselves the longest that is `there`."""
    parts = re.split(f"([{re.escape(separators)}])", given) if separators else [given]
    pieces = ["", *parts]  # a separator before every name
    found, start = [], 1
    while start < len(pieces):
        longest_first = range(len(pieces), start, -2)
        wholes = (
            (end, name) for end in longest_first for name in _spellings("".join(pieces[start:end])) if there(name)
        )
        end, name = next(wholes, (start + 1, pieces[start].strip()))
        found.append((pieces[start - 1], name))
        start = end + 1
    return found


def _spellings(name: str) -> tuple[str, ...]:
    """A name as it was given, and without blanks around it."""
    return (name, name.strip())


def _kind(path: Path, hoped: Kind) -> Kind:
    """The kind of a `.safetensors`; of a pickle, which takes torch to read, what is hoped."""
    check_packed(path)
    return kind_of(tensor_names(path)) if is_safetensors(path) else hoped


def _folder(given: str, option: str, wanted: str, forms: str) -> Path:
    name = class_name(Path(given) / "config.json")
    if name is None:
        raise BadInput(f"{option}={given!r} has no readable config.json; {forms}")
    if name != wanted:
        raise BadInput(f"{option}={given!r} is a {name}; {forms}")
    return Path(given)
