"""python -m examples.large_images STUDENTS: one picture of each way to draw large, and a sheet of them with their flags.

STUDENTS is a file of train.py for the shipped model, e.g. out/tiny_sd_level0/hyena.pt.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from PIL import Image, ImageDraw

from sd_hyena.config import GenerateConfig, parse
from sd_hyena.generation import generate
from sd_hyena.image_file import write_image

COMMON = "-n 1 -s 25 -c 3 -k 7"
LARGE = "-W 768 -H 512 -p 'a red circle on blue'"
SMALL_TILES = "--tile_width 32 --tile_height 32 --overlap 16"
PICTURES = {  # {y}: the students, {out}: the folder
    "six regions, mixture, exact VAE, students": "--config configs/generate/regions.yaml -y {y}",
    "the same, attention": "--config configs/generate/regions.yaml",
    "one piece, students": LARGE + " -y {y}",
    "one piece, attention": LARGE,
    "one piece, HyperTile": LARGE + " --hypertile 256",
    "MultiDiffusion, 256 px": f"{LARGE} --tiled_diffusion multidiffusion {SMALL_TILES}",
    "mixture, students": f"{LARGE} --tiled_diffusion mixture {SMALL_TILES} -y {{y}}",
    "SpotDiffusion": f"{LARGE} --tiled_diffusion spot --tile_width 32 --tile_height 32",
    "a picture to start from": "-W 256 -p 'a yellow square on green'",
    "drawn again at 512 px, tiles": (
        "-W 512 -p 'a yellow square on green' --init_image {out}/8.png --strength 0.4 --tiled_diffusion mixture "
        + SMALL_TILES
    ),
    "inpainted, right half": "-W 256 -p 'a blue square on green' --init_image {out}/8.png --mask {out}/mask.png --strength 1",
}
COLUMNS, CELL = 3, 384


def main(students: str, out: str = "out/large", sheet: str = "") -> None:
    """Draw all and write the sheet.

    Args:
        students: a student file of the shipped model
        out: folder of the pictures
        sheet: where the sheet goes; default: in the folder
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", (256, 256))
    mask.paste(255, (128, 0, 256, 256))
    mask.save(folder / "mask.png")
    cells = []
    for number, (title, flags) in enumerate(PICTURES.items()):
        path = folder / f"{number}.png"
        if not path.exists():
            given = shlex.split(f"{flags} {COMMON}".format(y=students, out=folder))
            print("python generate.py", shlex.join(given), flush=True)
            generate(parse(GenerateConfig, [*given, "-o", str(folder), "-f", str(number)]))
        with Image.open(path) as image:
            cells.append((title, image.convert("RGB")))
    page = contact_sheet(cells)
    if sheet:
        page.save(sheet)
    else:
        write_image(folder / "sheet.png", page, "", {"pictures": PICTURES})


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
