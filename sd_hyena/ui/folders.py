"""What the page's options may name: files of the folders that its command was given, by names; nothing else on the disk."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.landmarks import WORD, Landmarks
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.ui.page_config import PageConfig

WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin")
SHIPPED = "tiny_sd, which ships"
MARKS = {"models": "model_index.json", "vae": "config.json", "controlnets": "config.json"}  # of what is a folder
KINDS = {  # of an option, by the function that looks at its value
    given_path.model: "models",
    given_path.vae: "vae",
    given_path.students: "students",
    given_path.loras: "loras",
    given_path.embeddings: "embeddings",
    given_path.controlnets: "controlnets",
}
SEPARATORS = {"students": "+", "loras": ",", "embeddings": ",", "controlnets": ","}  # of options that take several
SUGGESTED = (WORD, f"{WORD}:128", f"{WORD}:level0")
UPLOADS = (given_path.plain_file, given_path.pictures)
PLACES = (given_path.folder, given_path.folders, given_path.run)  # the command's own to say


def kind_of(field: dataclasses.Field) -> str:
    """What an option names: a kind of file here, `upload`, `place`, or empty for what is no file."""
    if field.name == "data_path":
        return "data"
    look, beside = field.metadata["path"], field.metadata["beside"]
    if look in KINDS or beside:
        return KINDS.get(look, beside)
    if look in UPLOADS:
        return "upload"
    return "" if look is None else "place" if look in PLACES else f"{field.name}s"


class Folders:
    """Files by option and name, looked up anew whenever it is asked."""

    def __init__(self, config: PageConfig):
        split = lambda given: [Path(name) for name in given_path.several(given)]
        self._places = {
            "models": split(config.model_dir),
            "students": [*split(config.student_dir), Path(config.train_dir)],
            "vae": split(config.vae_dir),
            "loras": split(config.lora_dir),
            "embeddings": split(config.embedding_dir),
            "controlnets": split(config.controlnet_dir),
            "upscalers": split(config.upscaler_dir),
            "data": split(config.data_dir),
        }
        self._own = [Path(config.out_dir), Path(config.state_dir), SHIPPED_MODEL.parent]
        self._lora_dirs = config.lora_dir

    def files(self, kind: str) -> dict[str, Path]:
        """By the names that the page shows."""
        found: dict[str, Path] = {}
        for folder in self._places.get(kind, ()):
            for path in _below(folder, kind):
                name = folder.name if path == folder else path.relative_to(folder).as_posix()
                found[f"{folder.name}/{name}" if name in found else name] = path.absolute()
        if kind in given_path.BESIDE:
            for model in ["", *map(str, self.files("models").values())]:
                for name, path in given_path.beside(model, kind).items():
                    if path.name == name and path not in found.values():
                        found.setdefault(path.stem, path)
        return found

    def choices(self, kind: str) -> list[str]:
        """The names, with what needs no file."""
        names = list(self.files(kind))
        return [SHIPPED, *names] if kind == "models" else [*SUGGESTED, *names] if kind == "students" else names

    def value(self, option: str, kind: str, names: str | Sequence[str] | None) -> str:
        """What an option is given for names that were chosen. Raises BadInput for a name that is none of them."""
        if not names or names == SHIPPED:
            return ""
        files, chosen = self.files(kind), []
        for name in [names] if isinstance(names, str) else names:
            plain, colon, weight = _weighted(name) if kind == "loras" and name not in files else (name, "", "")
            if plain in files:
                chosen.append(f"{files[plain]}{colon}{weight}")
            elif kind == "students" and Landmarks.read(name):
                chosen.append(name)
            elif kind == "students" and "," in name:
                raise BadInput(
                    f"{option}={name!r}: alternatives are generate.py's; choose one here, or both in Compare"
                )
            else:
                raise BadInput(f"{option}={name!r} is in none of the page's folders; there are {_some(files)}")
        return SEPARATORS.get(kind, "+").join(chosen)

    def names(self, kind: str, value: str) -> tuple[list[str], list[str]]:
        """The other way: names for the value of an option, of alternatives the first, and what of it is in none of the
        folders."""
        files = self.files(kind)
        known = {os.path.realpath(path): name for name, path in files.items()}
        found, strange = [], []
        if kind == "students":
            entries = (given_path.alternatives(value) or [[]])[0]
        else:
            entries = given_path.several(value) if kind in SEPARATORS else [value]
        for entry in entries:
            weighted = kind == "loras" and not os.path.exists(entry)
            path, colon, weight = _weighted(entry) if weighted else (entry, "", "")
            if kind == "students" and Landmarks.read(entry):
                found.append(entry)
            elif name := path if path in files else known.get(os.path.realpath(path)):
                found.append(name + colon + weight)
            elif path and os.path.realpath(path) != str(SHIPPED_MODEL):
                strange.append(Path(path).name)
        return found, strange

    def check(self, config: GenerateConfig, uploads: Sequence[Path]) -> None:
        """Raise BadInput unless all that a config names lies where the page's command, or an upload, has put it."""
        for name, path in _named(config):
            if not self.hold(path, uploads):
                raise BadInput(f"{name} names a file outside the page's folders; start the page with that folder")

    def hold(self, path: str | Path, uploads: Sequence[Path]) -> bool:
        """Whether a path, after links, lies where the page's command, or an upload, has put files."""
        allowed = [*self._own, *uploads, *(folder for folders in self._places.values() for folder in folders)]
        roots, real = [os.path.realpath(place) for place in allowed], os.path.realpath(path)
        return any(real == root or real.startswith(root + os.sep) for root in roots)


def _weighted(entry: str) -> tuple[str, str, str]:
    """NAME:NUMBER in its parts; a NAME alone with two empty ones."""
    name, colon, weight = entry.rpartition(":")
    return (name, colon, weight) if re.fullmatch(r"-?[0-9]*\.?[0-9]+", weight) and colon else (entry, "", "")


def _named(config: Any) -> Iterator[tuple[str, Path]]:
    """Each path that a config names, its options looked up before."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), kind_of(field)
        if not value or kind in ("", "place"):
            continue
        look = field.metadata["path"]
        try:
            found = look(value, field.name) if look else [Path(value)]
        except BadInput:  # for whoever reads it to say; where it lies can be told
            found = [Path(value)]
        for one in found if isinstance(found, list | tuple) else [found]:
            path = one[0] if isinstance(one, tuple) else one
            if not (kind == "students" and Landmarks.read(str(path))):
                yield field.name, Path(path)
    if getattr(config, "regions", ""):  # looked at by now
        from sd_hyena.large.regions import read_regions

        for i, region in enumerate(read_regions(config.regions), 1):
            if region.mask:
                yield f"regions, region {i},", Path(region.mask)


def _below(folder: Path, kind: str) -> Iterable[Path]:
    mark = MARKS.get(kind)
    if kind == "data":
        return [path for path in (folder, *sorted(folder.rglob("*"))) if path.is_dir() or path.suffix == ".safetensors"]
    if mark and (folder / mark).is_file():
        return [folder]
    folders = [path.parent for path in sorted(folder.rglob(mark))] if mark else []
    inside = lambda path: any(parent in path.parents for parent in folders)
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in WEIGHTS and path.is_file()]
    if kind == "students":
        files = [path for path in files if "cache" not in path.relative_to(folder).parts and path.suffix != ".ckpt"]
        files.sort(key=lambda path: -path.stat().st_mtime)
        files = [path for path in files if path.suffix != ".pt" or path.with_suffix(".safetensors") not in files]
    return [*folders, *(path for path in files if not inside(path))]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "none"
