"""Is a large picture still one picture: every way to grow on the shipped model, judged by the frozen checker.

The first forty captions of one object that are right at the model's own 256 px, in the order of the held-out scenes, each
with its number as the seed; the file has a row for each of them. A picture is a row of its own, written as it is done, so the
same command goes on where it ended.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness.record import RESULTS, commit, facts, hardware
from examples.tiny_sd.checker import is_right
from examples.tiny_sd.measure import is_single
from examples.tiny_sd.scenes import Scene, draw, numbered_scene
from examples.tiny_sd.train import HELD_OUT_SEED, to_tensor
from sd_hyena.cost.operations import flops
from sd_hyena.cost.timing import seconds
from sd_hyena.files.comparison import similarity
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.watch import Watch
from sd_hyena.large.enlargement import enlarge
from sd_hyena.large.growing.stages import sizes
from sd_hyena.models.latents import decoded, encoded
from sd_hyena.models.upscaler import load_upscaler
from sd_hyena.options.generate_config import GenerateConfig

OWN, SEEDS = 256, 40
CPU = torch.device("cpu")
SMALL_TILES = dict(tiled_diffusion="mixture", tile_width=32, tile_height=32, overlap=16)
STUDENTS = "landmarks:256"
EDGE = 0.05  # of black to white from a pixel to the next: less is no edge
COLUMNS = ("size", "method", "by", "canvas", "scene", "caption", "right", "sharpness", "seconds", "TFLOP")
COLUMNS += ("psnr_dB", "commit", "date", "hardware")


@dataclass(frozen=True)
class Case:
    """One way to come by a picture of `size`; `share` is the part of the pictures asked for that it draws."""

    size: tuple[int, int]
    method: str
    by: str = ""  # attention or students
    canvas: str = "whole"  # or tiles
    share: float = 1.0

    @property
    def label(self) -> tuple[str, ...]:
        return f"{self.size[0]}x{self.size[1]}", self.method, self.by, self.canvas

    def config(self, scene: Scene, i: int) -> GenerateConfig:
        """Of picture i."""
        given: dict[str, Any] = dict(prompt=str(scene.caption), seed=i, steps=25, cfg_scale=3.0, num_images=1)
        given |= dict(width=self.size[0], height=self.size[1], device="cpu")
        given |= {"grow": "off" if self.method == "plain" else self.method}
        given |= {"hyena": STUDENTS} if self.by == "students" else {}
        return GenerateConfig(**given, **(SMALL_TILES if self.canvas == "tiles" else {}))


def cases(upscaler: str = "") -> list[Case]:
    """In the order of what is most worth knowing; `upscaler` is a file."""
    alone = ("Lanczos", f"{Path(upscaler).stem} alone") if upscaler else ("Lanczos",)
    ways = [(name, "", "whole", 1.0) for name in ("true render", *alone)]
    ways += [("redraw", "students", "whole", 1.0), ("plain", "students", "whole", 1 / 4)]
    ways += [("plain", "students", "tiles", 1 / 4), ("redraw", "students", "tiles", 1 / 4)]
    ways += [(name, "students", "whole", 1 / 2) for name in ("diffusehigh", "deep_shrink", "hidiffusion")]
    ways += [("demofusion", "students", "whole", 1 / 8), ("redraw", "attention", "whole", 1 / 4)]
    ways += [(name, "attention", "whole", 1 / 8) for name in ("diffusehigh", "deep_shrink", "hidiffusion")]
    sizes = (((512, 512), 1.0), ((1024, 1024), 1 / 2), ((768, 512), 1 / 2))
    return [Case(size, *way[:3], share=way[3] * share) for size, share in sizes for way in ways]


class _Silent(Watch):
    def note(self, line: str) -> None:
        """Nobody watches."""


def sharpness(image: np.ndarray) -> float:
    """The 95th percentile of the grey gradient, from a pixel to the next, over a picture's edges; 0 without any."""
    steps = np.hypot(*np.gradient(np.asarray(Image.fromarray(image).convert("L"), np.float32) / 255))
    edges = steps[steps > EDGE]
    return float(np.percentile(edges, 95)) if edges.size else 0.0


def reduced(image: np.ndarray) -> np.ndarray:
    """A picture whose short side is 256 px."""
    picture = Image.fromarray(image)
    factor = min(picture.size) / OWN
    return np.array(picture.resize([round(side / factor) for side in picture.size], Image.Resampling.BOX))


class Pictures:
    """Drawn when they are asked for, and kept in a folder."""

    def __init__(self, folder: Path, upscaler: str = ""):
        self.folder, self.engine = folder, Engine()
        self.upscaler = load_upscaler(upscaler, CPU, torch.float32) if upscaler else None
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, case: Case, i: int) -> Path:
        return self.folder / f"{'_'.join(filter(None, case.label)).replace(' ', '_')}_{i}.png"

    def drawn(self, case: Case, i: int) -> np.ndarray:
        path, scene = self.path(case, i), numbered_scene(HELD_OUT_SEED, i)
        if not path.exists():
            Image.fromarray(self._drawn(case, scene, i)).save(path)
        return np.array(Image.open(path))

    def _drawn(self, case: Case, scene: Scene, i: int) -> np.ndarray:
        if case.method == "true render":
            pipe = self.engine.load(GenerateConfig(device="cpu")).pipe
            return decoded(pipe, encoded(pipe, to_tensor(draw(scene, *case.size).copy())[None]))
        if not case.by:
            small = self.drawn(Case(sizes(case.size, OWN)[0], "plain", "attention"), i)
            upscaler = None if case.method == "Lanczos" else self.upscaler
            return np.array(enlarge(Image.fromarray(small), case.size, upscaler))
        return np.array(next(iter(self.engine.draw(case.config(scene, i), _Silent()))).image)

    def row(self, case: Case, i: int, counted: bool) -> dict[str, Any]:
        """One picture drawn anew, timed and judged; its operations if they are `counted`."""
        self.path(case, i).unlink(missing_ok=True)
        found: list[np.ndarray] = []
        call = lambda: found.append(self.drawn(case, i))
        operations: list[int] = []
        took = seconds((lambda: operations.append(flops(call))) if counted else call, CPU)
        scene, image = numbered_scene(HELD_OUT_SEED, i), found[0]
        row = dict(zip(("size", "method", "by", "canvas"), case.label, strict=True))
        row |= dict(scene=i, caption=str(scene.caption), right=int(is_right(reduced(image), scene.caption)))
        edges = sharpness(draw(scene, *case.size))  # 0 where a colour stands on one that is as bright
        row |= dict(sharpness=f"{sharpness(image) / edges:.3f}" if edges else "", seconds=f"{took:.1f}")
        row |= {"TFLOP": f"{operations[0] / 1e12:.3f}" if counted else "", "psnr_dB": ""}
        if case.by == "students":
            other = self.path(Case(case.size, case.method, "attention", case.canvas), i)
            row |= {"psnr_dB": f"{similarity(np.array(Image.open(other)), image)[0]:.1f}"} if other.exists() else {}
        if case.by == "attention":
            other = self.path(Case(case.size, case.method, "students", case.canvas), i)
            row |= {"psnr_dB": f"{similarity(np.array(Image.open(other)), image)[0]:.1f}"} if other.exists() else {}
        return row | dict(commit=commit(), date=date.today().isoformat(), hardware=hardware(CPU))


def rows(pictures: Pictures, images: int, done: list[dict[str, str]], upscaler: str = "") -> Iterator[dict[str, Any]]:
    """What is not done yet, for the first `images` of the scenes that are right at the model's own size."""
    known = {(row["size"], row["method"], row["by"], row["canvas"], int(row["scene"])): row for row in done}
    own, right, i = Case((OWN, OWN), "plain", "attention"), [], 0
    while len(right) < max(SEEDS, images):
        if is_single(numbered_scene(HELD_OUT_SEED, i)):
            row = known.get((*own.label, i))
            if row is None:
                row = pictures.row(own, i, counted=False)
                yield row
            right += [i] if int(row["right"]) else []
        i += 1
    for case in cases(upscaler):
        for n, i in enumerate(right[: max(1, round(images * case.share))]):
            if (*case.label, i) not in known:
                yield pictures.row(case, i, counted=n == 0 and bool(case.by))


def measure(images: int, folder: Path = RESULTS, kept: Path = Path("runs/grow"), upscaler: str = "") -> None:
    """Append to grow.csv in `folder` until all is there; the pictures lie in `kept`. Raises BadInput."""
    torch.set_num_threads(1)
    path = folder / "grow.csv"
    folder.mkdir(parents=True, exist_ok=True)
    done: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="") as file:
            done = list(csv.DictReader(file))
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for row in rows(Pictures(kept, upscaler), images, done, upscaler):
            writer.writerow(row)
            file.flush()
            path.with_suffix(".json").write_text(json.dumps(facts(CPU), indent=1) + "\n")
            print(*(row[key] for key in COLUMNS[:11]), flush=True)
