"""What a picture starts from: noise, another picture, a part of one; and ControlNets or LoRAs beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.files.framed import Size, framed, same_shape
from sd_hyena.files.mask import read_mask
from sd_hyena.files.picture import read_picture
from sd_hyena.files.pixels import picture_size
from sd_hyena.large.enlargement import enlarge
from sd_hyena.large.progress import Progress
from sd_hyena.large.tiled_upscaler import Enlarging
from sd_hyena.models.controlnet import check_controlnet, load_controlnet
from sd_hyena.models.inpainting import painting_masks
from sd_hyena.models.lora.applied import Given, loras_in
from sd_hyena.models.lora.lora_file import read_lora
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import BEFORE, GenerateConfig
from sd_hyena.processes.ranks import say

CELL = 8  # pixels
HALF = 128  # of 255: what a mask has to be to be white


@dataclass(frozen=True)
class Task:
    """The pictures, as the canvas has them, and the LoRAs with their weights that a config names."""

    config: GenerateConfig
    pictures: dict[str, Image.Image | None]  # by option: init_image, mask; the former as it is if an upscaler is to
    # enlarge it, None if the stage before gives it
    hints: tuple[Image.Image, ...]  # one for each ControlNet
    loras: tuple[Given, ...]
    notes: tuple[str, ...] = ()  # how the pictures are read

    @classmethod
    def of(cls, config: GenerateConfig, whole: GenerateConfig | None = None) -> Task:
        """Read the pictures and look at the weights, before a model is loaded. Raises BadInput.

        Of a stage, `whole` is the config of all: the pictures have its canvas's shape, and are stretched to the stage's,
        which is rounded to cells.
        """
        whole = whole or config
        for path, _ in config.controls:
            check_controlnet(path)
        pictures, notes = {}, []
        if config.init_image == BEFORE:
            pictures["init_image"] = None
        elif config.init_image:
            pictures["init_image"] = _start(config, whole, notes)
        if config.mask:
            pictures["mask"] = _mask(config, notes)
        hints = (_picture(config, whole, "control_image", path) for path in given_path.several(config.control_image))
        loras = (Given(read_lora(path), weight) for path, weight in given_path.loras(config.lora))
        return cls(config, pictures, tuple(hints), tuple(loras), tuple(notes))

    @property
    def enlarges(self) -> bool:
        """Whether an upscaler has work to do."""
        given = self.pictures.get("init_image") if self.config.upscaler else None
        return given is not None and (given.width < self.config.width or given.height < self.config.height)

    def enlarged(self, upscaler: Enlarging, progress: Progress) -> Task:
        """With the picture to start from as the canvas has it."""
        size = (self.config.width, self.config.height)
        upscaler, circular = upscaler if self.enlarges else None, self.config.circular
        larger = enlarge(self.pictures["init_image"], size, upscaler, progress, circular=circular)
        return replace(self, pictures=self.pictures | {"init_image": larger})

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


def _picture(config: GenerateConfig, whole: GenerateConfig, name: str, path: str) -> Image.Image:
    """A picture of the whole's shape at the stage's size. Raises BadInput."""
    shape, image = (whole.width, whole.height), _read(name, path, read_picture)
    if not same_shape(image.size, shape):
        raise BadInput(f"{name}={path!r} is {_size(image)}, of another shape than the {_size(shape)} picture; crop it")
    return _stretched(image, config)


def _stretched(image: Image.Image, config: GenerateConfig) -> Image.Image:
    return enlarge(image, (config.width, config.height), circular=config.circular)


def _start(config: GenerateConfig, whole: GenerateConfig, notes: list[str]) -> Image.Image:
    """The picture to start from at the stage's size; of the whole's shape alone, if an upscaler is to enlarge it. Raises
    BadInput."""
    size, shape = (config.width, config.height), (whole.width, whole.height)
    image = _read("init_image", config.init_image, read_picture)
    cut = abs(image.width * shape[1] - image.height * shape[0])
    if config.resize == "crop" and cut > CELL // 2 * sum(image.size):  # more than rounding to cells
        notes.append(
            f"note: init_image is {_size(image)}, of another shape than {_size(shape)}, and its middle is drawn again; "
            "-W or -H alone keeps the shape, --resize fit or stretch all of it"
        )
    fits = config.resize == "stretch" or same_shape(image.size, shape)
    enough = image.width >= size[0] and image.height >= size[1]
    if config.upscaler and enough and size == shape and not whole.hires:
        notes.append(
            f"note: upscaler={config.upscaler!r} has no effect here: init_image is {_size(image)}, the picture {_size(size)}"
        )
    if not config.upscaler or enough:
        if fits:
            return _stretched(image, config)
        return (
            framed(image, size, config.resize) if size == shape else _stretched(_shaped(image, shape, config), config)
        )
    return image if fits else _shaped(image, shape, config)


def _shaped(image: Image.Image, shape: Size, config: GenerateConfig) -> Image.Image:
    """Framed as the canvas is, in about its own pixels."""
    shares = image.width / shape[0], image.height / shape[1]
    share = min(shares) if config.resize == "crop" else max(shares)
    return framed(image, tuple(max(1, round(share * side)) for side in shape), config.resize)


def _read(name: str, path: str, read: Callable[[str], Image.Image]) -> Image.Image:
    try:
        return read(path)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from None


def _size(size: Image.Image | tuple[int, int]) -> str:
    return "{}x{}".format(*(size if isinstance(size, tuple) else size.size))


def _mask(config: GenerateConfig, notes: list[str]) -> Image.Image:
    """White or black, cut at one half. Raises BadInput for one that would leave everything as it is."""

    def read(path: str) -> Image.Image:
        mask, said = read_mask(path)
        notes.extend(filter(None, [said]))
        return mask

    size, mask = (config.width, config.height), _read("mask", config.mask, read)
    if not same_shape(mask.size, size) and not same_shape(mask.size, picture_size(config.init_image)):
        raise BadInput(
            f"mask={config.mask!r} is {_size(mask)}, of another shape than the {_size(size)} picture and than init_image; "
            "crop it"
        )
    mask = framed(mask, size, config.resize, rest=255)
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
