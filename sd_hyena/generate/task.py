"""What a picture starts from: noise, another picture, a part of one; and ControlNets or LoRAs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.files.mask import read_mask
from sd_hyena.files.picture import read_picture
from sd_hyena.models.controlnet import check_controlnet, load_controlnet
from sd_hyena.models.inpainting import painting_masks
from sd_hyena.models.lora.applied import Given, loras_in
from sd_hyena.models.lora.lora_file import read_lora
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import BEFORE, GenerateConfig
from sd_hyena.processes.ranks import say

HALF = 128  # of 255: what a mask has to be to be white


@dataclass(frozen=True)
class Task:
    """The pictures, as the canvas has them, and the LoRAs with their weights that a config names."""

    config: GenerateConfig
    pictures: dict[str, Image.Image | None]  # by option: init_image, mask; None for one that the stage before gives
    hints: tuple[Image.Image, ...]  # one for each ControlNet
    loras: tuple[Given, ...]
    notes: tuple[str, ...] = ()  # how the pictures are read

    @classmethod
    def of(cls, config: GenerateConfig) -> Task:
        """Read the pictures and look at the weights, before a model is loaded. Raises BadInput."""
        for path, _ in config.controls:
            check_controlnet(path)
        pictures, notes = {}, []
        if config.init_image == BEFORE:
            pictures["init_image"] = None
        elif config.init_image:
            pictures["init_image"] = _picture(config, "init_image", config.init_image)
        if config.mask:
            pictures["mask"] = _mask(config, notes)
        hints = (_picture(config, "control_image", path) for path in given_path.several(config.control_image))
        loras = (Given(read_lora(path), weight) for path, weight in given_path.loras(config.lora))
        return cls(config, pictures, tuple(hints), tuple(loras), tuple(notes))

    @contextmanager
    def prepared(self, pipe: Any, nets: Sequence[nn.Module]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """The diffusers pipeline for the task, made of `pipe`'s own parts and ControlNets, and what its call needs."""
        import diffusers as d

        kind, given, parts = d.AutoPipelineForText2Image, {}, {}
        if "init_image" in self.pictures:
            kind = d.AutoPipelineForImage2Image
            given |= {"image": self.pictures["init_image"], "strength": self.config.strength}
        if "mask" in self.pictures:
            kind = d.AutoPipelineForInpainting
            given |= {"mask_image": self.pictures["mask"]}
        if kind is not d.AutoPipelineForImage2Image:  # which takes the picture's size
            given |= {"width": self.config.width, "height": self.config.height}
        if nets:
            hints, scales = list(self.hints), [scale for _, scale in self.config.controls]
            several = len(nets) > 1
            parts["controlnet"] = d.MultiControlNetModel(list(nets)) if several else nets[0]
            given["control_image" if "image" in given else "image"] = hints if several else hints[0]
            given["controlnet_conditioning_scale"] = scales if several else scales[0]
        if parts or self.pictures:
            pipe = kind.from_pipe(pipe, **parts)
            pipe.set_progress_bar_config(disable=True)
        with painting_masks(pipe.unet) if "mask" in self.pictures else nullcontext():
            yield pipe, given


def _picture(
    config: GenerateConfig, name: str, path: str, read: Callable[[str], Image.Image] = read_picture
) -> Image.Image:
    """A picture at the canvas's size, as `read` gives it, RGB. Raises BadInput."""
    size = (config.width, config.height)
    try:
        image = read(path)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None
    if name != "init_image" and abs(image.width * size[1] - image.height * size[0]) > max(*image.size, *size):
        raise BadInput(
            f"{name}={path!r} is {image.width}x{image.height}, of another shape than the {size[0]}x{size[1]} picture; "
            "crop it"
        )
    return image.resize(size, Image.Resampling.LANCZOS)


def _mask(config: GenerateConfig, notes: list[str]) -> Image.Image:
    """White or black, cut at one half. Raises BadInput for one that would leave everything as it is."""

    def read(path: str) -> Image.Image:
        mask, said = read_mask(path)
        notes.extend(filter(None, [said]))
        return mask

    mask = _picture(config, "mask", config.mask, read)
    brightest = mask.getextrema()[1]
    if brightest < HALF:
        raise BadInput(
            f"mask={config.mask!r} is nowhere white (its brightest pixel is {brightest} of 255), so nothing would be drawn "
            "anew; paint white what is to change"
        )
    return mask.point(lambda value: 255 * (value >= HALF))


def controlnets(config: GenerateConfig, unet: nn.Module) -> list[nn.Module]:
    """Those that the config names, where and in the precision that the UNet is. Raises BadInput."""
    return [load_controlnet(path, unet) for path, _ in config.controls]


@contextmanager
def loras(pipe: Any, given: Sequence[Given]) -> Iterator[None]:
    """Within the block, `pipe` draws with these files; what of them is not used is said. Raises BadInput."""
    with loras_in(pipe, given) as applied:
        for note in applied.notes:
            say(note)
        yield
