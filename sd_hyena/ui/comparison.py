"""Two pictures of the same seed, drawn in turn, and what tells them apart."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.ui.album import Album
from sd_hyena.ui.job import Drawing, Job, Picture
from sd_hyena.ui.session import served

MOST = 12  # pictures of differences that stay


@dataclass
class Comparison(Job):
    """`pair` are the two configs; afterwards `pictures` are the left and the right one."""

    pair: tuple[GenerateConfig, GenerateConfig] = ()
    taken: Callable[[Picture], Any] = lambda picture: None
    name: str = "comparison"
    side: Drawing | None = field(default=None, repr=False)

    def do(self, engine: Any) -> None:
        for i, config in enumerate(self.pair):
            side = Drawing(config=config, taken=self.taken, told=self._hear(i))
            side.do(engine)
            self.pictures.append(side.pictures[0])

    def _hear(self, i: int) -> Callable[[Job], bool]:
        def hear(side: Job) -> bool:
            self.started = self.started or side.started
            self.total, self.done = 2 * side.total, i * side.total + side.done
            self.preview = side.preview
            self.notes[:] = side.notes
            return self.wanted

        return hear


def difference(left: Path, right: Path, folder: Path) -> tuple[Path | None, float | None, float | None]:
    """A picture of the difference, PSNR in dB and SSIM; nothing of pictures of two sizes."""
    import numpy as np
    from PIL import Image

    from sd_hyena.files.comparison import similarity
    from sd_hyena.files.picture import read_picture

    a, b = np.array(read_picture(left)), np.array(read_picture(right))
    if a.shape != b.shape:
        return None, None, None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"difference-{hashlib.sha256(f'{left} {right}'.encode()).hexdigest()[:16]}.png"
    Image.fromarray(np.abs(a.astype(np.int16) - b).astype(np.uint8)).save(path)
    for old in sorted(folder.glob("difference-*.png"), key=lambda file: -file.stat().st_mtime)[MOST:]:
        with suppress(OSError):  # Windows takes away no file that is being sent
            old.unlink()
    return path, *similarity(a, b)


def pair_of(album: Album, left: Picture, right: Picture, folder: Path) -> str:
    """Both under one slider, as HTML, with the numbers."""
    path, psnr, ssim = difference(left.path, right.path, folder)
    images = [escape(served(album.shown(one.path)), True) for one in (left, right)]
    names = [f"<span>{escape(_name(one))}</span>" for one in (left, right)]
    numbers = "of two sizes, so not compared by numbers"
    below = ""
    if path:
        numbers = f"PSNR {psnr:.1f} dB, SSIM {ssim:.3f}"
        source = escape(served(album.shown(path)), True)
        below = f"<p class='quiet'>the difference</p><img class='difference' src='{source}' alt='the difference of both pictures'>"
    return (
        f"<div class='pair-names'>{''.join(names)}</div><p class='quiet' id='pair-numbers'>{numbers}; "
        f"{left.seconds:.1f} s and {right.seconds:.1f} s</p>"
        f"<div class='pair'><img class='left' src='{images[0]}' alt='left picture'>"
        f"<img class='right' src='{images[1]}' alt='right picture'><i class='line'></i></div>"
        "<input type='range' class='pair-slider' min='0' max='100' value='50' "
        f"aria-label='how much of the left picture is shown'>{below}"
    )


def _name(picture: Picture) -> str:
    config = picture.config
    students = ", ".join(Path(name).name for name in config.hyena.split("+")) if config.hyena else "teacher"
    return f"{students}, {config.scheduler} {config.steps} steps, seed {config.seed}"
