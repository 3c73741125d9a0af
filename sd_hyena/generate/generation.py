"""From a GenerateConfig to image files."""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
from PIL import Image

from sd_hyena.files.comparison import side_by_side
from sd_hyena.files.hashes import file_sha256, lora_sha256
from sd_hyena.files.names import next_number, writable_folder
from sd_hyena.files.picture import write_image
from sd_hyena.generate.bar import Bar
from sd_hyena.generate.engine import Engine, NotDrawn
from sd_hyena.generate.job import Drawn
from sd_hyena.generate.watch import Watch
from sd_hyena.options import given_path
from sd_hyena.options.command_line import to_dict, with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.infotext import UsedLora, parameters
from sd_hyena.options.rules import drawn_seed
from sd_hyena.processes.device import pick_device
from sd_hyena.processes.group import joined, own_device


def generate(config: GenerateConfig, engine: Engine | None = None, watch: Watch | None = None) -> list[Path]:
    """Write all images and return their paths; of several processes (group.py) the first returns them, the others none.

    `engine` keeps what it has loaded; without one all is loaded for this call. Raises BadInput before anything is drawn,
    NotDrawn if an image failed.
    """
    config = with_paths(config)
    folder = writable_folder(config.out_dir)
    written: list[tuple[tuple[float, ...], list[Path]]] = []
    failed: list[str] = []
    with (
        closing(Engine()) if engine is None else nullcontext(engine) as engine,
        closing(Bar()) as bar,
        joined(pick_device(own_device(config.device))) as group,
    ):
        watch = watch or bar
        config = replace(config, seed=group.agreed(drawn_seed(config.seed)))
        first = group.agreed(next_number(folder, config.name_format))
        try:
            for drawn in engine.draw(config, watch, group):
                at = inf if drawn.stage is None else drawn.stage
                written.append(((drawn.h, drawn.n, at), write(drawn, config, folder, watch, first)))
        except NotDrawn as error:
            failed = error.failures
        everywhere = zip(*group.gathered((written, failed)), strict=True)
        written, failed = ([one for part in parts for one in part] for parts in everywhere)
    if failed:
        raise NotDrawn(failed, len(failed) + len(written), f", the others are in {folder}")
    return [path for _, paths in sorted(written) for path in paths] if group.rank == 0 else []


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
    path = write_image(folder / f"{name}.png", drawn.image, text, metadata)
    if drawn.teacher is None or drawn.stage is not None:
        return [path]
    psnr, ssim = drawn.similarity
    picture = Image.fromarray(side_by_side(np.array(drawn.teacher), np.array(drawn.image)))
    beside = path.with_name(f"{path.stem}-compare.png")
    beside = write_image(beside, picture, text, metadata | {"psnr": psnr, "ssim": ssim})
    watch.note(f"{beside}: teacher | student | difference, PSNR {psnr:.1f} dB, SSIM {ssim:.3f}")
    return [path, beside]
