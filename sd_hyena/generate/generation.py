"""From GenerateConfigs to image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from sd_hyena.files.comparison import side_by_side
from sd_hyena.files.grid import grid
from sd_hyena.files.hashes import file_sha256, lora_sha256
from sd_hyena.files.names import next_number, own_folder
from sd_hyena.files.picture import read_picture, write_image
from sd_hyena.generate.bar import Bar
from sd_hyena.generate.engine import Engine, NotDrawn
from sd_hyena.generate.job import Drawn
from sd_hyena.generate.order import Order
from sd_hyena.generate.watch import Part, Watch
from sd_hyena.options import given_path
from sd_hyena.options.command_line import to_dict, with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import UsedLora, parameters
from sd_hyena.options.rules import drawn_seed
from sd_hyena.processes.device import pick_device
from sd_hyena.processes.group import joined, own_device


class Written(NamedTuple):
    """A picture that was written: number `n` of config number `c`, by alternative number `h`; then what lies beside it."""

    c: int
    h: int
    n: int
    paths: list[Path]
    students: str
    prompt: str
    seed: int


def generate(
    config: GenerateConfig | Sequence[GenerateConfig], engine: Engine | None = None, watch: Watch | None = None
) -> list[Path]:
    """Write all images and return their paths; of several processes (group.py) the first returns them, the others none.

    `engine` keeps what it has loaded; without one all is loaded for this call, once for all configs. Raises BadInput before
    anything is drawn, NotDrawn if an image failed; the others are drawn all the same.
    """
    configs = [with_paths(one) for one in ([config] if isinstance(config, GenerateConfig) else config)]
    for one in configs if len(configs) > 1 else ():
        Order.of(one)
    written: list[Written] = []
    failed: list[str] = []
    with (
        ExitStack() as places,
        nullcontext([places.enter_context(own_folder(one.out_dir)) for one in configs]) as folders,
        closing(Engine()) if engine is None else nullcontext(engine) as engine,
        closing(Bar()) as bar,
        joined(pick_device(own_device(configs[0].device))) as group,
    ):
        for c, (one, folder) in enumerate(zip(configs, folders, strict=True)):
            part = watch or bar
            part = part if len(configs) == 1 else Part(part, c, len(configs))
            one = replace(one, seed=group.agreed(drawn_seed(one.seed)))
            first = group.agreed(next_number(folder, one.name_format))
            try:
                stages: dict[tuple[int, int], dict[int, Path]] = {}
                for drawn in engine.draw(one, part, group):
                    done, paths = drawn.config, write(drawn, one, folder, part, first)
                    before = stages.setdefault((drawn.h, drawn.n), {})
                    if drawn.stage in before:  # once more, in tiles
                        os.replace(paths[0], before[drawn.stage])
                        continue
                    if drawn.stage is not None:
                        before[drawn.stage] = paths[0]
                        continue
                    paths += before.values()
                    written.append(
                        Written(c, drawn.h, drawn.n, paths, to_dict(done)["hyena"], done.prompt or "", done.seed)
                    )
            except NotDrawn as error:
                failed += error.failures
        everywhere = zip(*group.gathered((written, failed)), strict=True)
        written, failed = ([one for part in parts for one in part] for parts in everywhere)
    written.sort()
    paths = [path for one in written for path in one.paths] if group.rank == 0 else []
    if paths and any(one.grid for one in configs):
        paths.append(write_image(folders[0] / f"grid.{configs[0].format}", contact_sheet(written), "", {}))
    if failed:
        raise NotDrawn(failed, len(failed) + len(written), f", the others are in {folders[0]}")
    return paths


def contact_sheet(written: Sequence[Written]) -> Image.Image:
    """The pictures in a grid: the alternatives beside each other, or, where there is one alone, what it drew of a prompt."""
    several = len({one.h for one in written}) > 1
    rows = dict.fromkeys((one.c, one.n) if several else (one.c,) for one in written)
    columns = dict.fromkeys(sorted((one.h, one.students) if several else (one.n, "") for one in written))
    names = [_named(students) if several else f"picture {n + 1}" for n, students in columns]
    cells, labels = {}, {}
    for one in written:
        row = list(rows).index((one.c, one.n) if several else (one.c,))
        column = list(columns).index((one.h, one.students) if several else (one.n, ""))
        cells[row, column] = partial(read_picture, one.paths[0])
        labels.setdefault(row, f"{one.prompt} (seed {one.seed})")
    return grid(cells, [labels[row] for row in range(len(rows))], names)


def _named(students: str) -> str:
    """An alternative as it heads a column."""
    return " + ".join(Path(name).stem for name in given_path.several(students.replace("+", ","))) or "attention"


def write(drawn: Drawn, config: GenerateConfig, folder: Path, watch: Watch, first: int = 0) -> list[Path]:
    """A picture with what repeats it, and the comparison with the teacher's beside it.

    `config` counts the pictures, and their names from `first` on.
    """
    one, n = to_dict(drawn.config), drawn.n
    vae_hash = file_sha256(config.vae) if Path(config.vae).is_file() else ""
    used = [UsedLora(path, weight, lora_sha256(path)) for path, weight in given_path.loras(drawn.config.lora)]
    text = parameters(one, drawn.model, drawn.model_sha256, drawn.students, used, vae_hash)
    metadata = {"config": one, "model_sha256": drawn.model_sha256, "students": drawn.students} | drawn.regions
    name = config.name_format.format(h=drawn.h, n=first + n, b=n // config.num_images, i=n % config.num_images)
    if drawn.stage is not None:
        name, metadata = f"{name}-stage{drawn.stage + 1}", metadata | {"stage": drawn.stage + 1}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    path = write_image(folder / f"{name}.{config.format}", drawn.image, text, metadata)
    if path.suffix != f".{config.format}":
        watch.note(f"note: {path} is no {config.format}, which has no room for what repeats it")
    if drawn.teacher is None or drawn.stage is not None:
        return [path]
    psnr, ssim = drawn.similarity
    picture = Image.fromarray(side_by_side(np.array(drawn.teacher), np.array(drawn.image)))
    beside = path.with_name(f"{path.stem}-compare{path.suffix}")
    beside = write_image(beside, picture, text, metadata | {"psnr": psnr, "ssim": ssim})
    watch.note(f"{beside}: teacher | student | difference, PSNR {psnr:.1f} dB, SSIM {ssim:.3f}")
    return [path, beside]
