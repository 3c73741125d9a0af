"""Where a model lies, which of its files are its UNet, and the hash that a student depends on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import check_weights, sha256
from sd_hyena.models.part import files_in
from sd_hyena.models.single_file import check_single_file
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL


def model_path(given: str) -> Path:
    """The folder or file of a model, checked without building it. Raises BadInput."""
    path = given_path.model(given or str(SHIPPED_MODEL))
    if path.is_file():
        check_single_file(path)
        return path
    for weights in (*path.glob("*/*.safetensors"), *path.glob("*/*.bin")):
        check_weights(weights)
    return path


def unet_files(path: Path) -> tuple[str | None, list[Path]]:
    """The files of a folder's UNet, and the variant that they are. Raises BadInput."""
    try:
        return files_in(path / "unet")
    except BadInput:
        raise BadInput(f"model {str(path)!r} has no weights in unet/") from None


def model_sha256(path: Path) -> str:
    """The hash of a single file, or of a folder's UNet, as diffusers loads it: what a student depends on."""
    if path.is_file():
        return sha256(path)
    hashes = [sha256(file) for file in unet_files(path)[1]]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
