"""Pictures of held-out captions on fixed seeds, drawn as generate.py draws them, and how near two sets are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sd_hyena.distil.pieces import Piece, Pieces
from sd_hyena.errors import BadInput
from sd_hyena.evaluate.cache import Cache
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.judge import judge_of
from sd_hyena.files.comparison import similarity
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.watch import Unannounced
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_JUDGE, SHIPPED_MODEL
from sd_hyena.processes.progress import Work, work
from sd_hyena.students.swap import swapped

Students = Mapping[str, nn.Module]  # by site
TEACHING = 5.0  # guidance of the pictures whose noisy states errors are measured on


class _Onlooker(Unannounced):
    """Shows how far a drawing is within `work` whose parts are pictures; keeps the latents that the last step left."""

    latents: Tensor

    def __init__(self, shown: Work):
        self.shown, self.before = shown, shown.done

    def step(self, done: float, total: int, latents: Tensor | None) -> None:
        self.shown.to(self.before + done / total)
        self.latents = latents if latents is not None else self.latents


class Pictures:
    """Pictures of an evaluation; those of the teacher are drawn once. `prompts` is a caption for each.

    With a folder `kept_in` each is kept there as it is drawn and taken from there by whatever run asks for it next; the
    model must then be as it lies on disk.
    """

    def __init__(self, config: EvaluationConfig, prompts: Sequence[str], engine: Engine, kept_in: Path | None = None):
        self.config, self.prompts, self.engine = config, prompts, engine
        with work(f"loading {Path(config.model or SHIPPED_MODEL).name}"):
            self.model = engine.load(self._config(0, (64, 64), 1.0))
        self.judge = judge_of(config.judge or (SHIPPED_JUDGE if self.model.path == SHIPPED_MODEL else ""))
        self.native = self.model.pipe.unet.config.sample_size * self.model.pipe.vae_scale_factor
        self.sizes = config.parsed_sizes(self.native)
        self.cache = Cache(kept_in, self.model) if kept_in else None
        self.teachers, self.latents = cache(self.drawn), cache(self._latents)

    def drawn(self, size: tuple[int, int], scale: float, students: Students | None = None) -> list[np.ndarray]:
        """Pictures of the first captions, uint8 (H, W, 3), of the teacher or of students; fewer as the size grows."""
        configs = self._configs(size, scale)

        def draw(i: int, watch: _Onlooker) -> Piece:
            (drawn,) = self.engine.draw(configs[i], watch)
            return {"pixels": torch.from_numpy(np.array(drawn.image))}

        by, n = "the student" if students else "the teacher", len(configs)
        what = f"{by} draws {n} pictures at {size[0]}x{size[1]}, guidance {scale:g}"
        with swapped(self.model.pipe.unet, students or {}):
            pieces = _got(draw, n, what, self.kept(size, scale, students))
        return [piece["pixels"].numpy() for piece in pieces]

    def kept(self, size: tuple[int, int], scale: float, students: Students | None = None) -> Pieces | None:
        """Where what `drawn` draws is kept."""
        if self.cache is None:
            return None
        check = partial(_check, name="pixels", shape=(size[1], size[0], 3))
        return self.cache.of("students" if students else "teacher", self._configs(size, scale), check, students)

    def _latents(self, i: int) -> Tensor:
        """Of picture i at the model's own size, (1, 4, h, w), scaled."""
        config = self._to_learn_errors_on(i)

        def draw(_: int, watch: _Onlooker) -> Piece:
            list(self.engine.draw(config, watch))
            return {"latents": watch.latents.cpu()}

        (piece,) = _got(draw, 1, f"the teacher draws picture {i + 1}, to measure errors on", self.kept_latents([i]))
        return piece["latents"].to(self.model.pipe.unet.device)

    def kept_latents(self, rows: Sequence[int]) -> Pieces | None:
        """Where these latents are kept."""
        if self.cache is None:
            return None
        configs = [self._to_learn_errors_on(i) for i in rows]
        check = partial(_check, name="latents", shape=(1, 4, configs[0].height // 8, configs[0].width // 8))
        return self.cache.of("latents", configs, check)

    def _to_learn_errors_on(self, i: int) -> GenerateConfig:
        return self._config(i, (self.native, self.native), TEACHING)

    def _configs(self, size: tuple[int, int], scale: float) -> list[GenerateConfig]:
        ratio = size[0] * size[1] / (self.sizes[0][0] * self.sizes[0][1])
        n = max(1, min(self.config.images, round(self.config.images / ratio)))
        return [self._config(i, size, scale) for i in range(n)]

    def _config(self, i: int, size: tuple[int, int], scale: float) -> GenerateConfig:
        """Of picture i, in one piece."""
        asked = self.config
        machine = dict(model=asked.model, device=asked.device, dtype=asked.dtype)
        picture = dict(prompt=self.prompts[i], width=size[0], height=size[1], seed=(asked.seed + i) % 2**32)
        plainly = dict(num_images=1, grow="off", tiled_diffusion="off")
        return GenerateConfig(**machine, **picture, **plainly, steps=asked.steps, cfg_scale=scale)

    def compared(self, teacher: list[np.ndarray], student: list[np.ndarray]) -> dict[str, float]:
        """PSNR, SSIM, and how many of both show their caption."""
        psnr, ssim = np.array([similarity(a, b) for a, b in zip(teacher, student, strict=True)]).T
        result = {
            "images": len(teacher),
            "psnr_median": float(np.median(psnr)),
            "psnr_mean": float(psnr.mean()),
            "psnr_min": float(psnr.min()),
            "ssim_mean": float(ssim.mean()),
            "share_above_20_dB": float((psnr > 20).mean()),
        }
        if self.judge:
            right = np.array(
                [[self.judge(x, text) for x in pair] for pair, text in zip(zip(teacher, student), self.prompts)]  # noqa: B905
            )
            result["teacher_right"], result["student_right"] = right.mean(axis=0).tolist()
            if right[:, 0].any():
                result["right_of_the_teachers_right"] = float(right[right[:, 0], 1].mean())
        return result


def _got(draw: Callable[[int, _Onlooker], Piece], n: int, what: str, kept: Pieces | None) -> list[Piece]:
    """What `draw` makes of the first n numbers, or made before where they are kept."""

    def make(rows: range, shown: Work) -> list[Piece]:
        made = []
        for i in rows:
            watch = _Onlooker(shown)
            made.append(draw(i, watch))
            shown.to(watch.before + 1)
        return made

    if kept:
        return kept.get(make, 1, what)
    with work(what, n) as shown:
        return make(range(n), shown)


def _check(piece: Piece, name: str, shape: tuple[int, ...]) -> None:
    """Raise BadInput for what is no such picture."""
    if piece.keys() != {name} or piece[name].shape != shape:
        raise BadInput("it does not hold what was drawn")
