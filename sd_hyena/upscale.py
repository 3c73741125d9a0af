"""python -m sd_hyena.upscale IN OUT --upscaler FILE --scale 4: a picture, or those of a folder, larger; see --help.

What a picture's text says (its `parameters`, our own config) stays with it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.command import run
from sd_hyena.options.command_line import option, with_paths
from sd_hyena.options.rules import ABSURD_SIDE, DType, between
from sd_hyena.processes.progress import work

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
LARGEST_TILE = 4096


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """Enlarge a picture, or those of a folder, by an upscaler model."""

    picture: str = option("", "a picture or a folder of pictures, also as the first plain argument")
    out: str = option("", "the PNG to write, or the folder for them, also as the second plain argument", "-o")
    upscaler: str = option(
        "", "a model of ESRGAN, Real-ESRGAN, SwinIR, DAT or the like; default: Lanczos", path=given_path.upscaler
    )
    scale: float = option(4.0, "how many times as wide and high, whatever the model's own scale", "-s")
    tile: int = option(256, "px of the picture that the model sees at once; halved where memory runs out")
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: DType = option("auto", "auto: float16 on a GPU, of models that are known to work in it")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        between(self, 1, 16, "scale")
        between(self, 32, LARGEST_TILE, "tile")


def main(config: UpscaleConfig) -> None:
    """Raises BadInput."""
    config = with_paths(config)
    pairs = list(_pairs(config))
    with work("loading PyTorch", announced=False):
        from sd_hyena.models.upscaler import load_upscaler
        from sd_hyena.processes.device import pick_device, pick_dtype
    device = pick_device(config.device)
    upscaler = None
    if config.upscaler:
        upscaler = load_upscaler(config.upscaler, device, pick_dtype(config.dtype, device))
    several, written = len(pairs) > 1, 0
    with work("enlarging", len(pairs), announced=several) as shown:
        for i, (source, wanted) in enumerate(pairs):
            try:
                progress = lambda done, total, i=i: shown.to(i + done / total)
                print(_enlarged(config, source, wanted, upscaler, progress))
                written += 1
            except BadInput as error:
                if not os.path.isdir(config.picture):
                    raise
                print(f"note: passed over: {error}", file=sys.stderr)
            shown.to(i + 1)
    if not written:
        raise BadInput(f"picture={config.picture!r} holds no picture that can be read")


def _pairs(config: UpscaleConfig) -> Iterator[tuple[Path, Path]]:
    """Each picture and where its larger one goes. Raises BadInput."""
    source, out = Path(config.picture), Path(config.out)
    if not config.picture or not config.out:
        raise BadInput("give a picture and where the larger one goes: python -m sd_hyena.upscale IN.png OUT.png")
    if source.is_dir():
        if out.suffix and not out.is_dir():
            raise BadInput(f"out={config.out!r} must be a folder, as picture={config.picture!r} is one")
        pictures = [path for path in sorted(source.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file()]
        if not pictures:
            raise BadInput(f"picture={config.picture!r} holds no picture ({', '.join(SUFFIXES)})")
        given_path.folder(config.out, "out")
        yield from ((path, out / f"{path.stem}.png") for path in pictures)
        return
    given_path.plain_file(config.picture, "picture")
    if out.is_dir() or not out.suffix:
        given_path.folder(config.out, "out")
        yield source, out / f"{source.stem}.png"
    elif out.suffix.lower() == ".png":
        given_path.folder(str(out.parent), "out")
        yield source, out
    else:
        raise BadInput(f"out={config.out!r}: PNG is what is written; end it in .png")


def _enlarged(config: UpscaleConfig, source: Path, wanted: Path, upscaler: Any, progress: Callable) -> Path:
    """Write one picture; returns where. Raises BadInput."""
    from PIL import Image

    from sd_hyena.files.names import writable_folder
    from sd_hyena.files.picture import write_png
    from sd_hyena.files.picture_text import read_texts
    from sd_hyena.files.pixels import read_pixels
    from sd_hyena.large.enlargement import enlarge

    image = read_pixels(source)
    size = tuple(max(round(side * config.scale), 1) for side in image.size)
    if max(size) > ABSURD_SIDE:
        raise BadInput(f"{str(source)!r} would be {size[0]}x{size[1]} px, larger than {ABSURD_SIDE} a side")
    larger = enlarge(image.convert("RGB"), size, upscaler, progress, config.tile)
    if image.mode in ("L", "LA"):
        larger = larger.convert("L")
    if image.mode in ("LA", "RGBA"):
        larger.putalpha(image.getchannel("A").resize(size, Image.Resampling.LANCZOS))
    texts: dict[str, str] = {}
    with suppress(BadInput):  # damaged ones are no reason to lose the picture
        texts = read_texts(source)
    name = upscaler.name if upscaler else "Lanczos"
    texts["postprocessing"] = f"Postprocess upscale by: {config.scale:g}, Postprocess upscaler: {name}"
    writable_folder(wanted.parent, "out")
    return write_png(wanted, larger, texts)


def command(arguments: list[str] | None = None) -> int:
    """Run the command line, whose first plain arguments are the picture and where the larger one goes; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    plain = list(takewhile(lambda argument: not argument.startswith("-"), given))[:2]
    named = [part for pair in zip(("--picture", "--out"), plain, strict=False) for part in pair]
    return run(UpscaleConfig, main, [*named, *given[len(plain) :]])


if __name__ == "__main__":
    sys.exit(command())
