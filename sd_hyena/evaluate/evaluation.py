"""python -m sd_hyena.evaluate out/hyena.pt: how close students are to their teacher, on what they never saw.

Per site, timestep and size the error of what the site answers; the UNet's prediction, with and without the caption and
guided; images on the same seeds. Everything is deterministic and lands in a folder: JSON, Markdown, pictures, TensorBoard.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.command_line import option, with_paths
from sd_hyena.options.rules import LARGEST_SIDE, DType
from sd_hyena.options.sampler import set_scheduler
from sd_hyena.options.shipped import SHIPPED_JUDGE, SHIPPED_MODEL

WORSE = 1.5  # times the error at the first size, from which a size needs attention, or training of its own


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measure trained students against their teacher at several sizes."""

    students: str = option(
        "",
        "files of train.py, also as plain arguments; a,b are compared, a+b are used together",
        path=given_path.students,
        beside="students",
    )
    model: str = option(
        "",
        "the teacher: diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
        path=given_path.model,
    )
    sizes: str = option("", "e.g. 256,512,768x384; default: the model's own size, twice that, and a rectangle")
    guidance: str = option("1,5,10", "scales of guidance")
    images: int = option(16, "images at the first size and each scale; fewer at larger sizes, at equal cost")
    states: int = option(16, "held-out states for the errors")
    steps: int = option(25, "denoising steps of an image", "-s")
    seed: int = option(10_000, "of the first image and state", "-k")
    prompts: str = option(
        "",
        "text file, of whose last quarter they are taken, where training takes none; default: the model's own",
        path=given_path.plain_file,
    )
    judge: str = option("", "module:function(image, caption) -> bool, whether an image shows its caption")
    out_dir: str = option("out/evaluation", "where the report goes", "-o", path=given_path.folder)
    device: str = option("auto", "auto, cpu, cuda, mps")
    dtype: DType = option("auto", "auto: float16 on a GPU")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        if min(self.images, self.states, self.steps) < 1:
            raise BadInput(f"{self.images=}, {self.states=} and {self.steps=} must be at least 1".replace("self.", ""))
        self.parsed_sizes(), self.scales()

    def parsed_sizes(self, native: int = 512) -> list[tuple[int, int]]:
        """(width, height) in pixels of each size. Raises BadInput."""
        text = self.sizes or f"{native},{2 * native},{3 * native // 2}x{3 * native // 4}"
        sizes = []
        for part in text.split(","):
            match = re.fullmatch(r"\s*(\d{1,6})(?:x(\d{1,6}))?\s*", part)
            width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
            if min(width, height) < 64 or max(width, height) > LARGEST_SIDE or width % 8 or height % 8:
                raise BadInput(
                    f"sizes: {part!r} must be WIDTHxHEIGHT or a side, multiples of 8 from 64 to {LARGEST_SIDE} pixels"
                )
            sizes.append((width, height))
        return sizes

    def scales(self) -> list[float]:
        """The scales of guidance. Raises BadInput."""
        try:
            scales = [float(part) for part in self.guidance.split(",")]
        except ValueError:
            scales = [-1.0]
        if not all(1 <= scale <= 1000 for scale in scales):
            raise BadInput(f"guidance={self.guidance!r} must be numbers from 1 (none) to 1000, e.g. 1,5,10")
        return scales


class Examiner:
    """Asks teacher and students the same questions; what the teacher answers is kept."""

    def __init__(self, config: EvaluationConfig):
        from sd_hyena.models import pipeline as p
        from sd_hyena.sites import find_sites

        path = p.model_path(config.model)
        self.config, self.device = config, p.pick_device(config.device)
        self.judge = _judge(config.judge or (SHIPPED_JUDGE if path == SHIPPED_MODEL else ""))
        _, prompts = p.split_prompts(p.prompts_of(path, config.prompts))
        self.prompts = [prompts[i % len(prompts)] for i in range(max(config.images, config.states))]
        self.pipe = p.load_pipeline(path, self.device, p.pick_dtype(config.dtype, self.device))
        set_scheduler(self.pipe, "ddim")
        self.noiser = p.noiser(self.pipe)
        self.sites = find_sites(self.pipe.unet)
        self.facts = {"model": path.name, "model_sha256": p.model_sha256(path)}
        self.native = self.pipe.unet.config.sample_size * self.pipe.vae_scale_factor
        self.sizes = config.parsed_sizes(self.native)
        self.images, self.states = cache(self._images), cache(self._states)
        self.drawn, self.branches = cache(self._drawn), cache(self._branches)

    def examine(self, students: dict[str, Any]) -> Iterator[tuple[tuple[int, int], dict[str, Any], list]]:
        """For each size: (width, height), its measurements, and rows of (scale, teacher's, student's images)."""
        from sd_hyena.students.swap import swapped

        for size in self._served(students):
            measured = {"sites": self._site_errors(students, size), "prediction": self._predictions(students, size)}
            measured["images"], rows = {}, []
            for scale in self.config.scales():
                teacher = self.images(size, scale)
                with swapped(self.pipe.unet, students):
                    student = self._images(size, scale)
                measured["images"][f"{scale:g}"] = self._compared(teacher, student)
                rows.append((scale, teacher, student))
            yield size, measured, rows

    def _served(self, students: dict[str, Any]) -> list[tuple[int, int]]:
        """The sizes that all students can serve: a 1-D one has a single size. Raises BadInput if there is none."""
        sites = {site.name: site for site in self.sites}
        served = [
            (width, height)
            for width, height in self.sizes
            if all(s.spec.serves(sites[n].size(height // 8, width // 8)) for n, s in students.items())
        ]
        if not served:
            given = ", ".join(f"{w}x{h}" for w, h in self.sizes)
            raise BadInput(
                f"sizes: the students are one-dimensional and serve none of {given}; name the size of training"
            )
        return served

    def _site_errors(self, students: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Relative error of each site's answer to the teacher's own input, in all and by timestep; block times."""
        import torch

        from sd_hyena.cost.timing import block_seconds
        from sd_hyena.students.losses import by_timestep, error_and_spread
        from sd_hyena.students.teacher import Teacher

        chosen = [site for site in self.sites if site.name in students]
        teacher, result = Teacher(self.pipe.unet, chosen), {}
        parts: dict[str, list] = {site.name: [] for site in chosen}
        for latents, timestep, text, empty in self.states(size):
            for context in (text, empty):
                for name, seen in teacher.activations(latents, timestep, context).items():
                    with torch.no_grad():
                        answer = students[name](seen.input, seen.projections, seen.size)
                    error, spread = error_and_spread(answer, seen.target)
                    parts[name].append(torch.stack([error, spread, timestep.to(error)]))
        for site in chosen:
            error, spread, timestep = torch.cat(parts[site.name], dim=1)
            row = {"relative_mse": float(error.sum() / spread.sum())}
            row |= {name: float(share) for name, share in by_timestep(error, spread, timestep).items()}
            attention, cells = self.pipe.unet.get_submodule(site.name), site.size(size[1] // 8, size[0] // 8)
            seconds = block_seconds(attention, students[site.name], cells, batch=2, rounds=3)
            row["attention_ms"], row["student_ms"] = (1e3 * s for s in seconds)
            result[site.short] = row
        return result

    def _predictions(self, students: dict[str, Any], size: tuple[int, int]) -> dict[str, float]:
        """Relative error of the UNet's prediction: with the caption, without, both, and guided at each scale.

        `as_noise` is that of both, told as the noise they foresee, whatever the model predicts: comparable between models.
        """
        import torch

        from sd_hyena.models.pipeline import as_noise
        from sd_hyena.students.losses import error_and_spread, guided

        scales = self.config.scales()
        names = ["conditional", "unconditional", "as_noise", *(f"guided_{scale:g}" for scale in scales)]
        sums = {name: torch.zeros(2) for name in names}
        for state, *pairs in zip(self.states(size), self.branches(size), self._branches(size, students), strict=True):
            noise = lambda *both, seen=state: as_noise(self.noiser, torch.cat(both), *seen[:2])
            truths, answers = ([c, u, noise(c, u), *(guided(c, u, scale) for scale in scales)] for c, u in pairs)
            for name, truth, ours in zip(names, truths, answers, strict=True):
                sums[name] += torch.stack([part.sum() for part in error_and_spread(ours, truth)]).cpu()
        both = sums["conditional"] + sums["unconditional"]
        return {name: float(e / s) for name, (e, s) in ({"both": both} | sums).items()}

    def _branches(self, size: tuple[int, int], students: dict[str, Any] | None = None) -> list[tuple]:
        """For each state the UNet's prediction (1, h w, C) with the caption and without, in float32."""
        import torch

        from sd_hyena.students.teacher import Teacher

        teacher = Teacher(self.pipe.unet, [])
        with torch.no_grad():
            return [
                tuple(
                    teacher.observe(latents, timestep, context, students).prediction.float().flatten(2).mT
                    for context in (text, empty)
                )
                for latents, timestep, text, empty in self.states(size)
            ]

    def _states(self, size: tuple[int, int]) -> list[tuple]:
        """Batches of one: noisy latents of images the teacher drew, their timestep, caption and the empty caption."""
        import torch

        from sd_hyena.models.pipeline import condition, resized

        n, batches = self.config.states, []
        for i in range(n):
            x0 = resized(self.pipe, self.drawn(i)[None], *size)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.config.seed + i)).to(x0)
            t = torch.tensor([int((i + 0.5) * self.noiser.config.num_train_timesteps / n)])
            texts = [condition(self.pipe, prompt, *size) for prompt in (self.prompts[i], "")]
            batches.append((self.noiser.add_noise(x0, noise, t.to(x0.device)), t.to(x0.device), *texts))
        return batches

    def _drawn(self, i: int):
        return self._latents([i], (self.native, self.native), 5.0)[0]

    def _latents(self, rows, size: tuple[int, int], scale: float):
        import torch

        return self.pipe(
            [self.prompts[i] for i in rows],
            width=size[0],
            height=size[1],
            num_inference_steps=self.config.steps,
            guidance_scale=scale,
            generator=[torch.Generator().manual_seed(self.config.seed + i) for i in rows],
            output_type="latent",
        ).images

    def _images(self, size: tuple[int, int], scale: float) -> list:
        """Images of the first captions as uint8 arrays; their number shrinks as the size grows."""
        from sd_hyena.generate.drawing import decoded

        ratio = size[0] * size[1] / (self.sizes[0][0] * self.sizes[0][1])
        n = max(1, min(self.config.images, round(self.config.images / ratio)))
        batch, images = max(1, 8 * self.native**2 // (size[0] * size[1])), []
        for start in range(0, n, batch):
            latents = self._latents(range(start, min(start + batch, n)), size, scale)
            images += [decoded(self.pipe, x[None]) for x in latents]
        return images

    def _compared(self, teacher: list, student: list) -> dict[str, float]:
        import numpy as np

        from sd_hyena.files.comparison import similarity

        psnr, ssim = np.array([similarity(a, b) for a, b in zip(teacher, student, strict=True)]).T
        result = {
            "images": len(teacher),
            "psnr_median": float(np.median(psnr)),
            "psnr_mean": float(psnr.mean()),
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


def _judge(name: str) -> Callable | None:
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"judge={name!r} cannot be imported ({error}); give module:function") from None


def advice(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Where a site is better kept as attention: where it is the faster one, or where the prediction suffers."""
    lines, first = [], next(iter(measured.values()))["prediction"]["both"]
    for size, found in measured.items():
        slow = [site for site, row in found["sites"].items() if row["student_ms"] > row["attention_ms"]]
        if slow:
            lines.append(f"{size}: attention is faster at {' '.join(slow)}; keep it there")
        ratio = found["prediction"]["both"] / max(first, 1e-12)
        if ratio > WORSE:
            lines.append(
                f"{size}: the prediction's error is {ratio:.1f} times that of the first size; keep attention, or train there"
            )
    return lines or ["at no size measured is attention the better choice"]


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Measure every alternative, write the report and return it. Raises BadInput before a model is loaded."""
    config = with_paths(config)
    if not config.students:
        raise BadInput("no students given; name a file of train.py, e.g. out/hyena.pt")
    _judge(config.judge)
    from sd_hyena.evaluate.report import Report
    from sd_hyena.files.names import writable_folder
    from sd_hyena.generate.alternatives import load_alternatives

    folder = writable_folder(config.out_dir)
    examiner = Examiner(config)
    report = Report(folder, examiner.facts)
    for alternative in load_alternatives(config.students, examiner.pipe.unet):
        measured: dict[str, Any] = {}
        label = "+".join(Path(name).stem for name in alternative.entry.split("+"))
        while label in report.content["students"]:
            label += "'"
        for size, found, rows in examiner.examine(alternative.students):
            measured["{}x{}".format(*size)] = found
            report.picture(label, size, rows)
            report.add(label, measured, advice(measured))
    report.finish()
    return report.content


def main(config: EvaluationConfig) -> None:
    evaluate(config)
