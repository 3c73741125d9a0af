"""Files that a picture of ours names by paths that are not there: of another machine, or moved since.

They are looked for by name, and by the hash that the picture has of them, in the folders of --model_dir and its like.
"""

from __future__ import annotations

import os
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.found import Found, plain_name
from sd_hyena.options.named_files import FLAGS, FOLDERS, find

KINDS = {"model": "", "vae": "vae", "embeddings": "embeddings", "lora": "loras"}  # beside a model


def of_own_picture(found: Found, chosen: dict[str, Any], untouched: dict[str, Any]) -> dict[str, Any]:
    """The options among `chosen` that change because a file lies elsewhere now; what a flag has answered stays.

    Raises BadInput for one that is not there either.
    """
    changed: dict[str, Any] = {}
    for option, kind in KINDS.items() if found.program == "sd_hyena" else ():
        value = chosen.get(option)
        if value and option in found.options and value == untouched[option]:
            there = set(given_path.beside((chosen | changed)["model"], kind)) if kind else set()
            place = lambda path, option=option, there=there: _place(path, option, there, found, chosen)
            changed[option] = given_path.renamed(value, kind, place) if kind else place(value)
    return changed


def _place(path: str, option: str, beside: set[str], found: Found, chosen: dict[str, Any]) -> str:
    if os.path.exists(path) or path in beside:
        return path
    folders, hash_ = chosen[FOLDERS[option]], found.hashes.get((option, plain_name(path)), "")
    if folders and (file := find(option, path, hash_, folders)):
        return str(file)
    if folders and option == "embeddings" and not path.lower().endswith(given_path.EMBEDDINGS):
        return folders  # the folder of all of them, as it is called here
    where = f"nor in {folders}" if folders else f"nor is --{FOLDERS[option]} given, where to look for it"
    known = f" (hash {hash_[:10]})" if hash_ else ""
    raise BadInput(
        f"{found.source}: its {option.removesuffix('s')} {path!r}{known} is not there, {where}; "
        f"{FLAGS.get(option, '--lora')} names another"
    )
