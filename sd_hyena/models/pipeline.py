"""A Stable Diffusion pipeline from a folder or file, offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.models.folder import load_network, parts_of
from sd_hyena.models.inpainting import complete_inputs, is_inpainting
from sd_hyena.models.location import model_path
from sd_hyena.models.prediction import tell_prediction
from sd_hyena.models.single_file import has_own_config, load_single_file
from sd_hyena.models.vae import load_vae
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.processes.device import pick_device, pick_dtype
from sd_hyena.processes.memory import is_out_of_memory

ALIGNMENT = 64  # bytes, of PyTorch's own memory


def load_pipeline(
    path: str | Path = SHIPPED_MODEL,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae: str = "",
) -> Any:
    """A diffusers pipeline without safety checker or progress bar, from local files alone, with another VAE if given.

    `auto` is the GPU if there is one, and half precision there. Raises BadInput.
    """
    path, device = model_path(str(path), vae), pick_device(device)
    dtype = pick_dtype(dtype, device)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipe = load_single_file(path, dtype, vae) if path.is_file() else _load_folder(path, dtype, vae)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(device)
    _align(pipe)
    if is_inpainting(pipe.unet):
        complete_inputs(pipe)
    if path.is_file() and not has_own_config(path):
        tell_prediction(pipe)
    return pipe


@torch.no_grad()
def _align(pipe: Any) -> None:
    """Move weights that lie as they do in a file, mapped into memory: on a CPU sums depend on it in the last bit."""
    for part in pipe.components.values():
        for weight in part.parameters() if isinstance(part, nn.Module) else ():
            if weight.data_ptr() % ALIGNMENT:
                weight.data = weight.data.clone()


def _load_folder(path: Path, dtype: torch.dtype, vae: str) -> Any:
    import diffusers

    index = json.loads((path / "model_index.json").read_text("utf-8"))
    kind = given_path.PIPELINES[index["_class_name"]]
    given: dict[str, Any] = dict(image_encoder=None, feature_extractor=None)
    if kind == "StableDiffusionPipeline":
        given |= dict(safety_checker=None, requires_safety_checker=False)
    for name in parts_of(index):
        own = not vae or name != "vae"
        given[name] = load_network(name, path / name, dtype) if own else load_vae(vae, path / "vae", dtype)
    try:
        return getattr(diffusers, kind).from_pretrained(path, local_files_only=True, **given)
    except Exception as error:  # whatever the libraries stumble over
        if is_out_of_memory(error):
            raise
        raise BadInput(f"model {str(path)!r} is no whole pipeline ({' '.join(str(error).split())[:200]})") from None
