"""A VAE of its own: a diffusers folder, or a `.safetensors` or `.ckpt` file in diffusers' or the original layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.quantised import unquantised
from sd_hyena.files.weights import read_checkpoint, shapes_of
from sd_hyena.files.weights_kind import VAE, kind_of
from sd_hyena.models.folder import NETWORKS, check_network, load_network, stored
from sd_hyena.models.part import filled
from sd_hyena.options import given_path
from sd_hyena.options.shown_hashes import shown_hashes


def check_vae(given: str) -> None:
    """Raise BadInput for what is no VAE; builds nothing."""
    path = given_path.vae(given)
    if path.is_dir():
        try:
            check_network(path, "vae", path)
        except BadInput as error:
            raise BadInput(f"vae={given!r} cannot be loaded: {error}") from None
    elif (kind := kind_of(shapes_of(path))) is not VAE:
        raise BadInput(f"vae={given!r} looks like {kind}")


def vae_sha256(given: str) -> str:
    """The hash of a file, or of a folder's weights."""
    path = Path(given)
    files = stored(path, NETWORKS["vae"][1]).files if path.is_dir() else [path]
    return hashlib.sha256("".join(shown_hashes(files, f"reading {path.name} for its hash")).encode()).hexdigest()


def load_vae(given: str, model: Path, dtype: torch.dtype) -> nn.Module:
    """The VAE of a folder or a file, checked before; a file has the sizes that the config in the folder `model` says.

    Raises BadInput.
    """
    if Path(given).is_dir():
        return load_network("vae", Path(given), dtype)
    try:
        return vae_of(unquantised(read_checkpoint(given)), model, dtype)
    except BadInput as error:
        raise BadInput(f"vae={given!r} does not suit this model: {error}") from None


def vae_of(tensors: Mapping[str, Tensor], model: Path, dtype: torch.dtype) -> nn.Module:
    """The VAE among the tensors of a file, as the config in the folder `model` says. Raises BadInput."""
    from diffusers import AutoencoderKL

    config = AutoencoderKL.load_config(model, local_files_only=True)
    return filled(AutoencoderKL, config, "VAE", vae_state(tensors, config), dtype)


def vae_state(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file's VAE by diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    if any(name.startswith("decoder.up_blocks.") for name in tensors):
        return dict(tensors)
    return convert_ldm_vae_checkpoint(dict(tensors), config)
