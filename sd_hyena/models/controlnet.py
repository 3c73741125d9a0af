"""ControlNets as people have them: a diffusers folder, diffusers' single file, or one in the original layout.

A file in the original layout may have `control_model.` before its names, and the whole model that it was trained on
beside it. What its tensors do not tell (heads, the embedding of time) is the UNet's that it steers, for a ControlNet is a
copy of that UNet's first half; or a config.json says it, in a folder that is called as the file is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import check_weights, read_checkpoint
from sd_hyena.files.weights_kind import is_controlnet, kind_of
from sd_hyena.models.folder import Stored, stored
from sd_hyena.models.part import Misfit, check_loaded, filled
from sd_hyena.options import given_path

PREFIX = "control_model."


def check_controlnet(given: str) -> None:
    """Raise BadInput for what is no ControlNet; builds nothing."""
    (path,) = given_path.controlnets(given)
    if path.is_dir():
        for weights in _stored(path).files:
            check_weights(weights)
    elif not is_controlnet(tensors := read_checkpoint(path)):
        raise BadInput(f"controlnet={given!r} looks like {kind_of(tensors)}")


def load_controlnet(given: str, unet: nn.Module) -> nn.Module:
    """The ControlNet of a folder or file, checked before, where and in the precision that the UNet is. Raises BadInput."""
    path = Path(given)
    try:
        net = _of_folder(path) if path.is_dir() else _of_file(path, unet)
        _check_fits(net.config, unet.config)
    except Misfit as error:
        raise BadInput(f"controlnet={given!r} does not suit this model: {error}") from None
    except BadInput as error:
        raise BadInput(f"controlnet={given!r}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise BadInput(f"controlnet={given!r} cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    return net.to(unet.device, unet.dtype).eval()


def _of_folder(path: Path) -> nn.Module:
    from diffusers import ControlNetModel

    weights = _stored(path)
    given = dict(variant=weights.variant, use_safetensors=weights.safetensors, local_files_only=True)
    net, told = ControlNetModel.from_pretrained(path, **given, output_loading_info=True)
    check_loaded("ControlNet", net, told)
    return net


def _stored(path: Path) -> Stored:
    if weights := stored(path, "diffusion_pytorch_model"):
        return weights
    raise BadInput(f"controlnet={str(path)!r} has no weights; expected diffusion_pytorch_model.safetensors")


def _of_file(path: Path, unet: nn.Module) -> nn.Module:
    from diffusers import ControlNetModel
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    tensors = read_checkpoint(path)
    own = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)} or tensors
    difference = own.pop("difference", None) is not None  # A1111's mark
    state = dict(own)
    if any(name.startswith("input_blocks.") for name in own):
        converted = convert_controlnet_checkpoint(own, unet.config)
        state = {name: tensor for name, tensor in converted.items() if tensor is not None}
        if len(state) != len(own):
            raise Misfit("it has layers that are not known here")
    config = _config(path, state, unet)
    _check_fits(config, unet.config)
    if difference:
        state = _added(state, unet)
    return filled(ControlNetModel, config, "ControlNet", state, torch.float32)


def _config(path: Path, state: Mapping[str, Tensor], unet: nn.Module) -> dict[str, Any]:
    """The file's own, if it has one, else the UNet's with what the tensors say of a ControlNet."""
    from diffusers import ControlNetModel

    beside = path.with_suffix("") / "config.json"
    if given_path.class_name(beside) == "ControlNetModel":
        return ControlNetModel.load_config(beside.parent, local_files_only=True)
    taken = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in taken}
    layers = [_attentions(state, f"down_blocks.{i}.") for i in range(len(config["down_block_types"]))]
    middle = _attentions(state, "mid_block.")
    config["down_block_types"] = [
        "CrossAttnDownBlock2D" if n else "DownBlock2D" for n in layers
    ]  # small ones leave some
    config["mid_block_type"] = "UNetMidBlock2DCrossAttn" if middle else "UNetMidBlock2D"
    config["transformer_layers_per_block"] = [max(n, 1) for n in (*layers[:-1], layers[-1] or middle)]
    embedding = "controlnet_cond_embedding."
    try:
        first = state[f"{embedding}conv_in.weight"]
        inner = sum(name.startswith(f"{embedding}blocks.") and name.endswith(".weight") for name in state)
        widths = [len(first), *(len(state[f"{embedding}blocks.{i}.weight"]) for i in range(1, inner, 2))]
        config |= {"conditioning_channels": first.shape[1], "conditioning_embedding_out_channels": widths}
        config["in_channels"] = state["conv_in.weight"].shape[1]  # an inpainting UNet's has nine, its ControlNet's four
        reading = next((value for name, value in state.items() if name.endswith("attn2.to_k.weight")), None)
        if reading is not None:
            config["cross_attention_dim"] = reading.shape[1]
    except (KeyError, IndexError) as error:
        raise Misfit(f"it lacks {error}, or it is of another shape") from None
    return config


def _attentions(state: Mapping[str, Tensor], block: str) -> int:
    """How many transformer layers the attentions of a block have."""
    inner = (re.match(rf"{re.escape(block)}attentions\.0\.transformer_blocks\.(\d+)\.", name) for name in state)
    return len({match[1] for match in inner if match})


def _check_fits(config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise BadInput unless a ControlNet's answers fit the UNet of this config."""
    if (width := config["cross_attention_dim"]) != model["cross_attention_dim"]:
        raise BadInput(
            f"it reads text of width {width}, this model's is {model['cross_attention_dim']}; "
            "give one that was trained for it"
        )
    for name in ("block_out_channels", "layers_per_block"):
        ours, theirs = (_plain(one[name]) for one in (config, model))
        if ours != theirs:
            raise Misfit(f"its {name} are {ours}, the model's {theirs}; give one that was trained for it")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _added(state: dict[str, Tensor], unet: nn.Module) -> dict[str, Tensor]:
    """The weights of a ControlNet that is stored as its difference from the UNet, whatever LoRA is in that now."""
    changed = {id(one.weight): one.was for one in getattr(vars(unet).get("loras"), "weights", ())}
    own = {name: changed.get(id(weight), weight.data).cpu() for name, weight in unet.named_parameters()}
    fits = lambda name, value: name in own and own[name].shape == value.shape
    return {name: value.float() + own[name].float() if fits(name, value) else value for name, value in state.items()}
