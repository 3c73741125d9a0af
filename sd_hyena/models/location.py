"""Where a model lies, which of its files are its UNet, and the hash that a student depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.models.folder import NETWORKS, check_folder, loaded_files, stored
from sd_hyena.models.single_file import check_single_file, has_own_config
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.shown_hashes import shown_hashes


def model_path(given: str, vae: str = "") -> Path:
    """The folder or file of a model, all that is read of it checked without building it. Raises BadInput.

    With another `vae` its own is not read.
    """
    path = given_path.model(given or str(SHIPPED_MODEL))
    if path.is_file():
        check_single_file(path, vae)
    else:
        check_folder(path, ("vae",) if vae else ())
    return path


def unet_files(path: Path) -> tuple[Path, ...]:
    """The files of a folder's UNet, as diffusers loads it. Raises BadInput."""
    if weights := stored(path / "unet", NETWORKS["unet"][1]):
        return weights.files
    raise BadInput(f"model {str(path)!r} has no weights in unet/")


def model_sha256(path: Path) -> str:
    """The hash of a single file, or of a folder's UNet, as diffusers loads it: what a student depends on."""
    files = (path,) if path.is_file() else unet_files(path)
    return _together(path, files)


def loaded_sha256(path: Path) -> str:
    """The hash of all that loading a model reads: what its pictures depend on. Raises BadInput."""
    if not path.is_file():
        return _together(path, loaded_files(path))
    return _together(path, [path, *(loaded_files(path.with_suffix("")) if has_own_config(path) else ())])


def _together(path: Path, files: Sequence[Path]) -> str:
    hashes = list(shown_hashes(files, f"reading {path.name} for its hash"))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
