"""Pictures of held-out captions on fixed seeds, drawn as generate.py draws them, and how near two sets are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.judge import judge_of
from sd_hyena.files.comparison import similarity
from sd_hyena.generate.engine import Engine
from sd_hyena.generate.watch import Unannounced
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_JUDGE, SHIPPED_MODEL
from sd_hyena.processes.progress import Work, work

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
    """Pictures of an evaluation; those of the teacher are drawn once. `prompts` is a caption for each."""

    def __init__(self, config: EvaluationConfig, prompts: Sequence[str], engine: Engine):
        self.config, self.prompts, self.engine = config, prompts, engine
        with work(f"loading {Path(config.model or SHIPPED_MODEL).name}"):
            self.model = engine.load(self._config(0, (64, 64), 1.0))
        self.judge = judge_of(config.judge or (SHIPPED_JUDGE if self.model.path == SHIPPED_MODEL else ""))
        self.native = self.model.pipe.unet.config.sample_size * self.model.pipe.vae_scale_factor
        self.sizes = config.parsed_sizes(self.native)
        self.teachers, self.latents = cache(self.drawn), cache(self._latents)

    def drawn(self, size: tuple[int, int], scale: float, by: str = "the teacher") -> list[np.ndarray]:
        """Pictures of the first captions, uint8 (H, W, 3), with whatever is swapped in; fewer as the size grows."""
        ratio = size[0] * size[1] / (self.sizes[0][0] * self.sizes[0][1])
        n, images = max(1, min(self.config.images, round(self.config.images / ratio))), []
        with work(f"{by} draws {n} pictures at {size[0]}x{size[1]}, guidance {scale:g}", n) as shown:
            for i in range(n):
                images += [np.array(d.image) for d in self.engine.draw(self._config(i, size, scale), _Onlooker(shown))]
                shown.to(i + 1)
        return images

    def _latents(self, i: int) -> Tensor:
        """Of picture i at the model's own size, (1, 4, h, w), scaled."""
        with work(f"the teacher draws picture {i + 1}, to measure errors on", 1) as shown:
            watch = _Onlooker(shown)
            list(self.engine.draw(self._config(i, (self.native, self.native), TEACHING), watch))
        return watch.latents

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
