"""python -m examples.large_images STUDENTS: a picture of each way to draw large, a sheet of them, and how near they are.

STUDENTS is a file of train.py for the shipped model, e.g. out/tiny_sd_level0/hyena.pt. The ControlNet and the LoRA are
those of `python -m examples.tiny_sd.controlnet` and `python -m examples.tiny_sd.finetune`; pictures whose model has not
been trained are left out. A second run draws only what is missing.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from sd_hyena.files.comparison import similarity
from sd_hyena.files.picture import write_image
from sd_hyena.generate.generation import generate
from sd_hyena.options.command_line import parse
from sd_hyena.options.generate_config import GenerateConfig

COMMON = "-n 1 -s 25 -c 3 -k 7 --grow off"
LARGE = "-W 768 -H 512 -p 'a red circle on blue'"
SMALL_TILES = "--tile_width 32 --tile_height 32 --overlap 16"
AGAIN = f"-W 512 -p 'a yellow square on green' --init_image {{out}}/start.png --tiled_diffusion mixture {SMALL_TILES}"
CONTROLNET = "--controlnet {outlines}/controlnet --control_image {outlines}"
PASTEL = "--lora {pastel}/lora/pytorch_lora_weights.safetensors"


class Picture(NamedTuple):
    """What a picture shows, the flags that draw it ({y}: the students, {out}: the folder), and which one it is held to."""

    title: str
    flags: str
    against: str = ""


PICTURES = {
    "regions": Picture(
        "six regions, mixture, exact VAE, students",
        "--config configs/generate/regions.yaml -y {y}",
        "regions_attention",
    ),
    "regions_attention": Picture("the same, attention", "--config configs/generate/regions.yaml"),
    "students": Picture("one piece, students", LARGE + " -y {y}", "attention"),
    "attention": Picture("one piece, attention", LARGE),
    "hypertile": Picture("one piece, HyperTile 256 px", LARGE + " --hypertile 256", "attention"),
    "bricks": Picture("one piece, bricks", LARGE + " --attn_shape brick", "attention"),
    "multidiffusion": Picture(
        "MultiDiffusion, 256 px", f"{LARGE} --tiled_diffusion multidiffusion {SMALL_TILES}", "attention"
    ),
    "mixture": Picture("mixture, students", f"{LARGE} --tiled_diffusion mixture {SMALL_TILES} -y {{y}}"),
    "spot": Picture("SpotDiffusion", f"{LARGE} --tiled_diffusion spot --tile_width 32 --tile_height 32"),
    "start": Picture("a picture to start from", "-W 256 -p 'a yellow square on green'"),
    "again": Picture("drawn again at 512 px", AGAIN + " --strength 0.6"),
    "inverted": Picture(
        "with noise inversion", AGAIN + " --strength 0.6 --noise_inversion 10 --renoise_strength 0.3 --tiled_vae exact"
    ),
    "inpainted": Picture(
        "inpainted, right half",
        "-W 256 -p 'a blue square on green' --init_image {out}/start.png --mask {out}/mask.png --strength 1",
    ),
    "controlnet": Picture(
        "a ControlNet's outlines, one tile",
        f"-W 256 -p 'a red triangle on white vertical stripes' {CONTROLNET}/outlines.png",
    ),
    "controlnet_tiles": Picture(
        "outlines of four, tiles, students",
        "-W 512 -p 'a red triangle on white' -y {y} --tiled_diffusion mixture "
        f"{SMALL_TILES} {CONTROLNET}/outlines_512.png",
    ),
    "lora": Picture("a LoRA, tiles", f"{LARGE} --tiled_diffusion mixture {SMALL_TILES} {PASTEL}"),
}
COLUMNS, CELL = 3, 384


def main(
    students: str, out: str = "out/large", outlines: str = "runs/outlines", pastel: str = "runs/pastel", sheet: str = ""
) -> None:
    """Draw what is missing, write the sheet and print how near pictures are to those that they are held to.

    Args:
        students: a student file of the shipped model
        out: folder of the pictures
        outlines: what examples.tiny_sd.controlnet wrote
        pastel: what examples.tiny_sd.finetune wrote
        sheet: where the sheet goes; default: in the folder
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", (256, 256))
    mask.paste(255, (128, 0, 256, 256))
    mask.save(folder / "mask.png")
    places = dict(y=students, out=folder, outlines=outlines, pastel=pastel)
    drawn = {}
    for name, picture in PICTURES.items():
        path = folder / f"{name}.png"
        given = shlex.split(f"{picture.flags} {COMMON}".format(**places))
        missing = [
            place for place in (outlines, pastel) if any(place in one for one in given) and not Path(place).exists()
        ]
        if missing:
            print(f"{name} is left out: there is no {missing[0]}")
            continue
        if not path.exists():
            print("python generate.py", shlex.join(given), flush=True)
            generate(parse(GenerateConfig, [*given, "-o", str(folder), "-f", name]))
        with Image.open(path) as image:
            drawn[name] = image.convert("RGB")
    for name, image in drawn.items():
        if against := PICTURES[name].against:
            psnr, ssim = similarity(np.array(drawn[against]), np.array(image))
            print(f"{PICTURES[name].title} | {PICTURES[against].title} | {psnr:.1f} dB | {ssim:.3f}")
    page = contact_sheet([(PICTURES[name].title, image) for name, image in drawn.items()])
    if sheet:
        page.save(sheet)
    else:
        write_image(folder / "sheet.png", page, "", {"pictures": {name: PICTURES[name].flags for name in drawn}})


def contact_sheet(cells: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures of any size, made to fit, with a title each."""
    height = CELL * 2 // 3 + 18
    page = Image.new("RGB", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * height), "white")
    pen = ImageDraw.Draw(page)
    for i, (title, image) in enumerate(cells):
        x, y = i % COLUMNS * CELL, i // COLUMNS * height
        image.thumbnail((CELL - 6, CELL * 2 // 3))
        page.paste(image, (x, y + 16))
        pen.text((x + 2, y + 2), title, fill="black")
    return page


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
