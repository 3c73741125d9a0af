"""What a picture starts from: noise, another picture, a part of one; and a ControlNet or LoRAs beside it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd_hyena.config import GenerateConfig
from sd_hyena.errors import BadInput
from sd_hyena.image_file import read_picture
from sd_hyena.inpainting import is_inpainting, paint_masks
from sd_hyena.weights_file import check_safetensors, read_checkpoint
from sd_hyena.weights_kind import LORA, NOTHING_KNOWN, kind_of


@dataclass(frozen=True)
class Task:
    """The pictures, as the canvas has them, and the LoRAs with their weights that a config names."""

    config: GenerateConfig
    pictures: dict[str, Image.Image]  # by option: init_image, mask, control_image
    loras: tuple[tuple[Path, float], ...]

    @classmethod
    def of(cls, config: GenerateConfig) -> Task:
        """Read the pictures and look at the weights, before a model is loaded. Raises BadInput."""
        names = [name for name in ("init_image", "mask", "control_image") if getattr(config, name)]
        if config.controlnet:
            _check_controlnet(config.controlnet)
        return cls(config, {name: _picture(config, name) for name in names}, tuple(_loras(config.lora)))

    def prepared(self, pipe: Any) -> tuple[Any, dict[str, Any]]:
        """The diffusers pipeline for the task, made of `pipe`'s own parts, and what its call needs. Raises BadInput."""
        import diffusers as d

        _load_loras(pipe, self.loras)
        kind, given, parts = d.AutoPipelineForText2Image, {}, {}
        if "init_image" in self.pictures:
            kind = d.AutoPipelineForImage2Image
            given |= {"image": self.pictures["init_image"], "strength": self.config.strength}
        if "mask" in self.pictures:
            kind = d.AutoPipelineForInpainting
            given |= {"mask_image": self.pictures["mask"].convert("L")}
            if is_inpainting(pipe.unet):
                paint_masks(pipe.unet)
        if kind is not d.AutoPipelineForImage2Image:  # which takes the picture's size
            given |= {"width": self.config.width, "height": self.config.height}
        if self.config.controlnet:
            controlnet = d.ControlNetModel.from_pretrained(self.config.controlnet, local_files_only=True)
            parts["controlnet"] = controlnet.to(pipe.device, pipe.unet.dtype)
            name = "control_image" if "image" in given else "image"
            given |= {name: self.pictures["control_image"], "controlnet_conditioning_scale": self.config.control_scale}
        if parts or self.pictures:
            pipe = kind.from_pipe(pipe, **parts)
            pipe.set_progress_bar_config(disable=True)
        return pipe, given


def _picture(config: GenerateConfig, name: str) -> Image.Image:
    """A picture at the canvas's size, RGB. Raises BadInput."""
    path, size = getattr(config, name), (config.width, config.height)
    try:
        image = read_picture(path)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    if name != "init_image" and abs(image.width * size[1] - image.height * size[0]) > max(*image.size, *size):
        raise BadInput(
            f"{name}={path!r} is {image.width}x{image.height}, of another shape than the {size[0]}x{size[1]} picture; "
            "crop it"
        )
    return image.resize(size, Image.Resampling.LANCZOS)


def _check_controlnet(path: str) -> None:
    needed = "give a diffusers folder of a ControlNetModel"
    try:
        kind = json.loads((Path(path) / "config.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"controlnet={path!r} has no readable config.json; {needed}") from None
    if kind != "ControlNetModel":
        raise BadInput(f"controlnet={path!r} is a {kind}; {needed}")


def _loras(entries: str) -> list[tuple[Path, float]]:
    """FILE or FILE:WEIGHT, separated by commas. Raises BadInput."""
    found = []
    for entry in filter(None, (part.strip() for part in entries.split(","))):
        path, weight = entry, 1.0
        name, _, number = entry.rpartition(":")
        if name:
            with suppress(ValueError):  # C:\lora.safetensors
                path, weight = name, float(number)
        if not Path(path).is_file():
            raise BadInput(f"lora={entry!r} is no file; give FILE.safetensors or FILE.safetensors:WEIGHT")
        check_safetensors(Path(path))
        kind = kind_of(read_checkpoint(path))
        if kind not in (LORA, NOTHING_KNOWN):  # what is unknown here, diffusers may know
            raise BadInput(f"lora={path!r} looks like {kind}")
        found.append((Path(path), weight))
    return found


def _load_loras(pipe: Any, loras: tuple[tuple[Path, float], ...]) -> None:
    names: list[str] = []
    for i, (path, _) in enumerate(loras):
        stem = path.stem.replace(".", "_")  # regions call a LoRA by its file's name
        names.append(name := f"{stem}_{i}" if stem in names else stem)
        try:
            pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name, local_files_only=True)
        except (ValueError, KeyError, RuntimeError) as error:
            raise BadInput(f"lora={str(path)!r} does not fit this model ({str(error).splitlines()[0][:160]})") from None
    if names:
        pipe.set_adapters(names, [weight for _, weight in loras])
