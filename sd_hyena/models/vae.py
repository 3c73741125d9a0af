"""A VAE of its own: a diffusers folder, or a `.safetensors` or `.ckpt` file in diffusers' or the original layout."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import check_weights, read_checkpoint, sha256
from sd_hyena.files.weights_kind import VAE, kind_of
from sd_hyena.models.part import check_loaded, files_in, filled
from sd_hyena.options import given_path


def check_vae(given: str) -> None:
    """Raise BadInput for what is no VAE; builds nothing."""
    path = given_path.vae(given)
    if path.is_dir():
        for weights in path.glob("diffusion_pytorch_model*"):
            check_weights(weights)
    elif (kind := kind_of(read_checkpoint(path))) is not VAE:
        raise BadInput(f"vae={given!r} looks like {kind}")


def vae_sha256(given: str) -> str:
    """The hash of a file, or of a folder's weights."""
    path = Path(given)
    files = sorted(path.glob("diffusion_pytorch_model*")) if path.is_dir() else [path]
    return hashlib.sha256("".join(sha256(file) for file in files).encode()).hexdigest()


def load_vae(given: str, model: Path, dtype: torch.dtype) -> nn.Module:
    """The VAE of a folder or a file, checked before; a file has the sizes that the config in the folder `model` says.

    Raises BadInput.
    """
    from diffusers import AutoencoderKL

    if Path(given).is_dir():
        try:
            told = dict(dtype=dtype, variant=files_in(Path(given))[0], local_files_only=True)
            vae, keys = AutoencoderKL.from_pretrained(given, **told, output_loading_info=True)
            check_loaded("VAE", vae, keys)
            return vae
        except BadInput as error:
            raise BadInput(f"vae={given!r}: {error}") from None
        except (OSError, ValueError) as error:
            raise BadInput(f"vae={given!r} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    try:
        return vae_of(read_checkpoint(given), model, dtype)
    except BadInput as error:
        raise BadInput(f"vae={given!r} does not suit this model: {error}") from None


def vae_of(tensors: Mapping[str, Tensor], model: Path, dtype: torch.dtype) -> nn.Module:
    """The VAE among the tensors of a file, as the config in the folder `model` says. Raises BadInput."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = AutoencoderKL.load_config(model, local_files_only=True)
    if any(name.startswith("decoder.up_blocks.") for name in tensors):
        return filled(AutoencoderKL, config, "VAE", tensors, dtype)
    return filled(AutoencoderKL, config, "VAE", convert_ldm_vae_checkpoint(dict(tensors), config), dtype)
