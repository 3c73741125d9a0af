"""Files that prompts and pictures call by name, or by hash, looked for in the folders of --lora_dir and its like."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Container, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.hashes import file_sha256, lora_sha256
from sd_hyena.options import given_path
from sd_hyena.options.found import WEIGHTS, Found, plain_name, quoted
from sd_hyena.options.prompt_constructs import NamedLora, without_loras
from sd_hyena.options.shown_hashes import Digest, shown_hashes

FOLDERS = {"model": "model_dir", "vae": "vae_dir", "embeddings": "embedding_dir", "lora": "lora_dir"}
FLAGS = {"model": "-m", "vae": "--vae", "embeddings": "--embeddings"}
HASHED: dict[str, Digest] = {"lora": lora_sha256}  # others by the whole file
FOLDER_FILES = {  # what may be a folder of diffusers: by which file of which class it is known
    "model": {"model_index.json": given_path.PIPELINES},
    "vae": {"config.json": ("AutoencoderKL",)},
}


def find(option: str, name: str, hash: str, folders: str) -> Path | None:
    """The file or diffusers folder for `option` that is called so, blind to case and suffix, else the one of that hash; None
    if there is none.

    name: with or without a suffix, or folders before it. hash: the beginning of a hash, as A1111 has it; may be empty.
    folders: separated by commas; all below them counts. Of several of one name that of the hash is taken, else the first.
    """
    places = list(_below(option, folders))
    named = [place for place in places if plain_name(place.name) == plain_name(name)]
    if len(named) == 1 or (named and not hash):
        return named[0]
    fallback = named[0] if named else None
    return _of_hash(option, name, hash.lower(), named or places) or fallback if hash else fallback


def _of_hash(option: str, name: str, hash: str, places: Sequence[Path]) -> Path | None:
    """A folder has the hash of its network's weights, of several that of all together."""
    weights = [_weights(place, option) for place in places]
    what = f"looking for {quoted(name)} by its hash in {len(places)} files"
    hashes = shown_hashes([file for files in weights for file in files], what, HASHED.get(option, file_sha256))
    with closing(hashes):
        for place, files in zip(places, weights, strict=True):
            found = [next(hashes) for _ in files]
            together = hashlib.sha256("".join(found).encode()).hexdigest()
            if any(one.startswith(hash) for one in (*found, together)):
                return place
    return None


def _below(option: str, folders: str) -> Iterable[Path]:
    """Files of weights and, of what can be a folder, folders, whose own files are left out."""
    wanted, seen = FOLDER_FILES.get(option, {}), set()
    for folder in given_path.several(folders, os.path.isdir):
        for place, below, names in os.walk(folder, followlinks=True):
            below.sort()
            if (real := os.path.realpath(place)) in seen:  # links in a circle
                below.clear()
                continue
            seen.add(real)
            if any(_is_folder_of(Path(place), *pair) for pair in wanted.items()):
                below.clear()
                yield Path(place)
                continue
            files = (Path(place, name) for name in sorted(names))
            yield from (file for file in files if file.suffix.lower() in WEIGHTS and file.is_file())


def _is_folder_of(place: Path, index: str, classes: Container[str]) -> bool:
    return (place / index).is_file() and given_path.class_name(place / index) in classes


def _weights(place: Path, option: str) -> list[Path]:
    if place.is_file():
        return [place]
    network = place / "unet" if option == "model" else place
    return sorted(path for path in network.glob("*") if path.suffix.lower() in WEIGHTS)


def of_picture(found: Found, chosen: dict[str, Any], untouched: dict[str, Any]) -> dict[str, Any]:
    """The options among `chosen` that change because the picture names files that are there; what is not is left.

    What a flag has answered (it is no longer as `untouched`) stays. Raises BadInput, as `with_loras` does.
    """
    changed: dict[str, Any] = {}
    for option in ("model", "vae"):
        for name, hash_ in found.names.get(option, []):
            if chosen[option] == untouched[option]:
                changed |= _found_or_left(found, option, name, hash_, chosen)
    given = (
        {path.stem.lower() for path, _ in given_path.embeddings(chosen["embeddings"])}
        if chosen["embeddings"]
        else set()
    )
    files = [chosen["embeddings"]] if chosen["embeddings"] else []
    for name, hash_ in found.names.get("embeddings", []):
        if name.lower() not in given and not (there := _found_or_left(found, "embeddings", name, hash_, chosen)):
            changed |= _without_word(name, chosen | changed, untouched)
        elif name.lower() not in given:
            files += there.values()
    if found.names.get("embeddings"):
        changed["embeddings"] = ",".join(files)
    hashes = dict(found.names.get("lora", []))
    if chosen["prompt"] == untouched["prompt"]:
        _, called = without_loras(chosen["prompt"] or "", "prompt")
        plain = {plain_name(lora.name) for lora in called} | {
            path.stem.lower() for path, _ in given_path.loras(chosen["lora"])
        }
        for name in hashes:
            if plain_name(name) not in plain:
                found.leave(f"LoRA {quoted(name)!r}", "lora")
    return changed | resolved(chosen | changed, hashes)


def _without_word(name: str, chosen: dict[str, Any], untouched: dict[str, Any]) -> dict[str, str]:
    """The picture's prompts without ComfyUI's `embedding:NAME`, which it passes over, too, where there is no such file."""
    word = re.compile(rf"(?<!\w)embedding:{re.escape(name)}(?!\w)")
    texts = {option: chosen[option] for option in ("prompt", "negative_prompt")}
    texts = {option: text for option, text in texts.items() if text and text == untouched[option]}
    return {option: word.sub("", text).strip(" ,") for option, text in texts.items() if word.search(text)}


def _found_or_left(found: Found, option: str, name: str, hash_: str, chosen: dict[str, Any]) -> dict[str, str]:
    folders = chosen[FOLDERS[option]]
    file = find(option, name, hash_, folders) if folders else None
    if file is None:
        where = f"is not in {folders}" if folders else f"give {FLAGS[option]}, or --{FOLDERS[option]} where it lies"
        where = f"hash {hash_[:10]}; {where}" if hash_ else where
        found.leave(f"{option.removesuffix('s')} {quoted(name)!r} ({where})", "" if option == "embeddings" else option)
        return {}
    return {option: str(file)}


def resolved(values: dict[str, Any], hashes: dict[str, str] | None = None) -> dict[str, Any]:
    """`prompt` without <lora:NAME:WEIGHT>, and `lora` with the files of these; empty if there are none.

    A file is looked for among those of `lora`, whose weight is then the prompt's, beside the model, in `lora_dir`, and as a
    path. `hashes`
    tells files of other names. Raises BadInput for one that is not there.
    """
    if without_loras(values["negative_prompt"], "negative_prompt")[1]:
        raise BadInput(
            "negative_prompt: a LoRA by name stands in the prompt; move it there, with a weight below 0 if need be"
        )
    prompt, called = without_loras(values["prompt"] or "", "prompt")
    if not called:
        return {}
    weights = _given_loras(values)
    given = [*weights, *given_path.beside(values["model"], "loras").values()]
    for lora in called:
        weights[_file_of(lora, given, values["lora_dir"], (hashes or {}).get(lora.name, ""))] = lora.weight
    return {"prompt": prompt, "lora": ",".join(f"{path}:{weight!r}" for path, weight in weights.items())}


def _given_loras(values: dict[str, Any]) -> dict[Path, float]:
    return dict(given_path.loras(given_path.located(values["lora"], "lora", values["model"], "loras")))


def _file_of(lora: NamedLora, given: Iterable[Path], folders: str, hash_: str) -> Path:
    file = next((path for path in given if plain_name(path.name) == plain_name(lora.name)), None)
    file = file or (find("lora", lora.name, hash_, folders) if folders else None)
    file = file or (Path(lora.name) if os.path.isfile(lora.name) else None)
    if file is None:
        where = f"is not in lora_dir={folders!r}" if folders else "has no folder to be looked for in"
        raise BadInput(
            f"prompt: the LoRA {lora.name!r} {where}; give --lora_dir FOLDER or --lora FILE, or take it out of the prompt (-p)"
        )
    return file
