"""What the pack takes from ComfyUI. No other file imports it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Downsample, Encoder, ResnetBlock, Upsample
from torch import Tensor, nn

__all__ = ["AttnBlock", "Decoder", "Downsample", "Encoder", "ResnetBlock", "Upsample"]

STUDENTS = "hyena"  # a folder of models/

folder_paths.add_model_folder_path(STUDENTS, os.path.join(folder_paths.models_dir, STUDENTS))
with contextlib.suppress(OSError):
    os.makedirs(os.path.join(folder_paths.models_dir, STUDENTS), exist_ok=True)


def student_files() -> list[str]:
    names = folder_paths.get_filename_list(STUDENTS)
    return [name for name in names if name.endswith((".safetensors", ".pt"))]


def student_path(name: str) -> str:
    """Raises FileNotFoundError."""
    return folder_paths.get_full_path_or_raise(STUDENTS, name)


def attend(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """The attention that ComfyUI would have used in a block with these options; (B, L, D) each."""
    precision = options.get("attn_precision")
    return attention.optimized_attention(
        q, k, v, options["n_heads"], attn_precision=precision, transformer_options=options
    )


def sigmas(model: Any, start: float, end: float) -> tuple[float, float] | None:
    """The noise levels between which a model is from `start` to `end` of its schedule (0 to 1); None for all of it."""
    if start <= 0 and end >= 1:
        return None
    sampling = model.get_model_object("model_sampling")
    return sampling.percent_to_sigma(start), sampling.percent_to_sigma(end)


def unet_of(model: Any) -> nn.Module:
    return model.get_model_object("diffusion_model")


def load_vae(vae: Any, memory: float) -> None:
    """Bring a VAE to its device, beside so many free bytes."""
    vae.throw_exception_if_invalid()
    comfy.model_management.load_models_gpu(
        [vae.patcher], memory_required=memory, force_full_load=getattr(vae, "disable_offload", False)
    )


class Progress:
    """The node's bar in the page, and its cancel button."""

    def __init__(self):
        self.bar = None

    def __call__(self, done: int, total: int) -> None:
        """Raises ComfyUI's InterruptProcessingException where the user has asked for it."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.bar is None:
            self.bar = comfy.utils.ProgressBar(total)
        self.bar.update_absolute(done, total)
