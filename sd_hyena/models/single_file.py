"""A pipeline from a single file, offline: `.safetensors` or `.ckpt` in the layout of the original Stable Diffusion.

What tensors do not tell (heads, noise levels, the VAE's scale) comes from the configurations that ship in layouts/, and
their sizes have to be the file's. Another model brings its own: a diffusers folder, its weights not needed, that is
called as the file is, `mine/` beside `mine.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.averaged import averages_as_weights
from sd_hyena.files.quantised import unquantised, without_scales
from sd_hyena.files.weights import read_checkpoint, shapes_of, stamps
from sd_hyena.files.weights_kind import TEXTS, UNET, layout_of
from sd_hyena.models.clip_vocabulary import clip_tokenizer
from sd_hyena.models.part import Misfit, check_state, filled
from sd_hyena.models.vae import load_vae, vae_of
from sd_hyena.processes.memory import is_out_of_memory

LAYOUTS = Path(__file__).with_name("layouts")
NAMES = {"sd15": "Stable Diffusion 1.x", "sd21": "Stable Diffusion 2.x", "sdxl": "SDXL"}
PURE_NOISE = "ztsnr"  # a tensor that marks models trained from pure noise on
OWN_CONFIG = "a model of another size needs its diffusers configuration (model_index.json, unet/config.json ...) in {}"


def check_single_file(path: Path, vae: str = "") -> None:
    """Raise BadInput unless all that loading reads of a file, but for its numbers, makes a model that is known here.

    With another `vae` its own is not read.
    """
    try:
        shapes = averages_as_weights(without_scales(shapes_of(path)))
        layout = layout_of(shapes)
    except BadInput as error:
        raise BadInput(f"model {str(path)!r} {error}") from None
    if fault := _fault(path, layout, bool(vae), stamps(path), stamps(*_configuration(path, layout).rglob("*.json"))):
        raise BadInput(fault)


@lru_cache(maxsize=16)
def _fault(path: Path, layout: str, other_vae: bool, *_stamps: Any) -> str:
    """What keeps a pipeline from being built of tensors of these names and sizes; empty if nothing."""
    with torch.device("meta"):
        shapes = averages_as_weights(without_scales(shapes_of(path)))
        tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    try:
        _made(path, tensors, layout, torch.float32, other_vae or None)
    except BadInput as error:
        return str(error)
    return ""


def has_own_config(path: Path) -> bool:
    """Whether the folder that is called as the file is describes it."""
    return (path.with_suffix("") / "model_index.json").is_file()


def configuration_of(path: Path) -> Path:
    """The folder of configurations, without weights, that describes a file. Raises BadInput."""
    return _configuration(path, layout_of(averages_as_weights(shapes_of(path))))


def _configuration(path: Path, layout: str) -> Path:
    return path.with_suffix("") if has_own_config(path) else LAYOUTS / layout


def load_single_file(path: Path, dtype: torch.dtype, vae: str = "") -> Any:
    """The pipeline of a file, checked before, on the CPU; with the VAE of another file if given. Raises BadInput."""
    try:
        tensors = averages_as_weights(unquantised(read_checkpoint(path)))
    except BadInput as error:
        raise BadInput(f"model {str(path)!r}: {error}") from None
    layout = layout_of({name: tuple(value.shape) for name, value in tensors.items()})
    other_vae = load_vae(vae, _configuration(path, layout) / "vae", dtype) if vae else None
    return _made(path, tensors, layout, dtype, other_vae)


def _made(path: Path, tensors: Mapping[str, Tensor], layout: str, dtype: torch.dtype, vae: Any) -> Any:
    """The pipeline of a file's tensors, what it lacks said of the file. Raises BadInput."""
    folder = _configuration(path, layout)
    try:
        return _built(tensors, layout, folder, dtype, vae)
    except Misfit as error:
        hint = f", as {folder} says" if has_own_config(path) else f"; {OWN_CONFIG.format(path.with_suffix(''))}"
        raise BadInput(f"model {str(path)!r} looks like {NAMES[layout]}, but {error}{hint}") from None
    except BadInput as error:
        raise BadInput(f"model {str(path)!r}: {error}") from None
    except Exception as error:  # whatever the libraries stumble over
        if is_out_of_memory(error):
            raise
        raise BadInput(
            f"model {str(path)!r} cannot be built as {folder} says: {' '.join(str(error).split())[:200]}"
        ) from None


def _built(tensors: Mapping[str, Tensor], layout: str, folder: Path, dtype: torch.dtype, vae: Any) -> Any:
    """The pipeline, or None of tensors without numbers."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    config = diffusers.UNet2DConditionModel.load_config(folder, subfolder="unet", local_files_only=True)
    config["in_channels"] = tensors[f"{UNET}input_blocks.0.0.weight"].shape[1]  # an inpainting model's is 9
    known = convert_ldm_unet_checkpoint({name: name for name in tensors}, config)  # diffusers' name -> the file's
    if strange := [name for name in tensors if name.startswith(UNET) and name not in known.values()]:
        raise Misfit(f"its UNet has layers that this one does not know: {strange[0]} (and {len(strange) - 1} more)")
    state = {name: tensors[original] for name, original in known.items()}
    parts: dict[str, Any] = {"unet": filled(diffusers.UNet2DConditionModel, config, "UNet", state, dtype)}
    if vae is not None:
        parts["vae"] = vae
    elif any(name.startswith(("first_stage_model.", "vae.")) for name in tensors):
        parts["vae"] = vae_of(tensors, folder / "vae", dtype)
    else:
        raise BadInput("it holds no VAE; give one with --vae FILE, or a file that has its own")
    for name in (name for name in index if name.startswith("text_encoder")):
        kind = getattr(transformers, index[name][1])
        parts[name] = _text_encoder(kind, _below(tensors, TEXTS[layout, name]), folder / name, dtype)
        name = name.replace("text_encoder", "tokenizer")
        parts[name] = _tokenizer(folder / name)
    scheduler = getattr(diffusers, index["scheduler"][1])
    parts["scheduler"] = scheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)
    if PURE_NOISE in tensors:
        parts["scheduler"].register_to_config(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    if any(value.is_meta for value in tensors.values()):
        return None
    if layout == "sdxl":
        zeros = index.get("force_zeros_for_empty_prompt", True)
        return diffusers.StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros)
    without = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    return diffusers.StableDiffusionPipeline(**parts, **without)


def _below(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors behind the first of the prefixes that any has."""
    found = ({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)} for prefix in prefixes)
    return next(filter(None, found), {})


def _text_encoder(kind: Any, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype) -> nn.Module:
    """A CLIP text encoder of OpenCLIP's tensors or of transformers'; what OpenCLIP holds beyond the config is left.

    Stable Diffusion 2 reads its last layer but one.
    """
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    config = kind.config_class.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = kind(config)
    if any(".resblocks." in name for name in tensors):
        found = convert_open_clip_checkpoint(model, dict(tensors), "model.")
    else:
        found = {name.removeprefix("transformer."): value for name, value in tensors.items()}
        if (projection := found.pop("text_projection", None)) is not None:  # ComfyUI's, as OpenCLIP has it
            found["text_projection.weight"] = projection.T.contiguous()
    # Some files, and transformers' model without projection, leave the first part of the names away.
    found = {name.removeprefix("text_model."): value for name, value in found.items()}
    expected = model.state_dict()
    state = {name: found[short] for name in expected if (short := name.removeprefix("text_model.")) in found}
    check_state("text encoder", expected, state)
    if any(value.is_meta for value in state.values()):
        return model
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype).eval()


def _tokenizer(folder: Path) -> Any:
    """The folder's own vocabulary, or CLIP's with the padding that the folder says."""
    from transformers import CLIPTokenizer

    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return clip_tokenizer(json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["pad_token"])
