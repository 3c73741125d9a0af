"""What a picture starts from: noise, another picture, a part of one; and a ControlNet or LoRAs beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd_hyena.config import GenerateConfig
from sd_hyena.errors import BadInput
from sd_hyena.weights_file import check_safetensors


def check_files(config: GenerateConfig) -> None:
    """Read pictures and look at weights before a model is loaded. Raises BadInput."""
    for name in ("init_image", "mask", "control_image"):
        if getattr(config, name):
            _picture(config, name)
    if config.controlnet:
        index = Path(config.controlnet) / "config.json"
        try:
            kind = json.loads(index.read_text("utf-8"))["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise BadInput(
                f"controlnet={config.controlnet!r} has no readable config.json; give a diffusers folder"
            ) from None
        if kind != "ControlNetModel":
            raise BadInput(
                f"controlnet={config.controlnet!r} is a {kind}; give a diffusers folder of a ControlNetModel"
            )
    for path, _ in _loras(config):
        check_safetensors(path)


def prepare(pipe: Any, config: GenerateConfig) -> tuple[Any, dict[str, Any]]:
    """The diffusers pipeline for the task, made of `pipe`'s own parts, and what its call needs. Raises BadInput."""
    import diffusers as d

    _load_loras(pipe, config)
    size = dict(width=config.width, height=config.height)
    parts: dict[str, Any] = {}
    if config.controlnet:
        controlnet = d.ControlNetModel.from_pretrained(config.controlnet, local_files_only=True)
        parts["controlnet"] = controlnet.to(pipe.device, pipe.unet.dtype)
    if config.mask:
        kind, given = d.AutoPipelineForInpainting, size | {"mask_image": _picture(config, "mask").convert("L")}
    elif config.init_image:
        kind, given = d.AutoPipelineForImage2Image, {}
    else:
        kind, given = d.AutoPipelineForText2Image, size
    if config.init_image:
        given |= {"image": _picture(config, "init_image"), "strength": config.strength}
    if config.controlnet:
        name = "control_image" if config.init_image else "image"
        given |= {name: _picture(config, "control_image"), "controlnet_conditioning_scale": config.control_scale}
    if parts or config.init_image:
        pipe = kind.from_pipe(pipe, **parts)
        pipe.set_progress_bar_config(disable=True)
    return pipe, given


def _picture(config: GenerateConfig, name: str) -> Any:
    """A picture as the canvas has it, RGB. Raises BadInput."""
    from PIL import Image, ImageOps

    path = getattr(config, name)
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInput(f"{name}={path!r} is no readable image ({str(error)[:120]})") from None
    size = (config.width, config.height)
    if name != "init_image" and abs(image.width * size[1] - image.height * size[0]) > max(*image.size, *size):
        raise BadInput(
            f"{name}={path!r} is {image.width}x{image.height}, of another shape than the {size[0]}x{size[1]} picture; crop it"
        )
    return image.resize(size, Image.Resampling.LANCZOS)


def _loras(config: GenerateConfig) -> list[tuple[Path, float]]:
    found = []
    for entry in filter(None, (part.strip() for part in config.lora.split(","))):
        name, colon, weight = entry.rpartition(":")
        try:
            found.append((Path(name), float(weight)) if colon and name else (Path(entry), 1.0))
        except ValueError:
            found.append((Path(entry), 1.0))  # C:\lora.safetensors
        if not found[-1][0].is_file():
            raise BadInput(f"lora={entry!r} is no file; give FILE.safetensors or FILE.safetensors:WEIGHT")
    return found


def _load_loras(pipe: Any, config: GenerateConfig) -> None:
    loras = _loras(config)
    if not loras:
        return
    names = [f"{path.stem.replace('.', '_')}_{i}" for i, (path, _) in enumerate(loras)]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, local_files_only=True)
        except ImportError:
            raise BadInput("lora needs peft; run pip install 'peft>=0.19'") from None
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"lora={str(path)!r} does not fit this model ({str(error).splitlines()[0][:160]})") from None
    pipe.set_adapters(names, [weight for _, weight in loras])
