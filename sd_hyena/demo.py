"""python -m sd_hyena.demo: the main job, end to end, on the small Stable Diffusion that ships. CPU, offline, minutes.

Distils one self-attention into four students trained alike, prints what each is worth, and puts the teacher's
images beside theirs.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sd_hyena.files.names import for_a_shell
from sd_hyena.options.command import run
from sd_hyena.options.command_line import option
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import work
from sd_hyena.processes.ranks import say

OPERATORS = ("pointwise", "causal", "bidirectional", "hyena2d")
BLOCK_SIZES = (1, 2, 4)  # times the width
IMAGES = 4
SITE = "IN01"
LR = 1e-2  # the best of 2e-3, 5e-3, 1e-2 for each of them


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Distil one self-attention of the shipped model and compare: errors, images, block times."""

    width: int = option(256, "image width and height in pixels", "-W")
    n_steps: int = option(400, "training steps of each student", "-n")
    batch_size: int = option(8, "samples in a step", "-b")
    num_samples: int = option(32, "images the teacher draws to train on")
    sample_steps: int = option(20, "denoising steps of each of them")
    steps: int = option(25, "denoising steps of each picture that is compared", "-s")
    out_dir: str = option("out/demo", "where everything goes", "-o")
    log_dir: str = option("logs/demo", "TensorBoard", "-l")
    debug: bool = option(False, "show the traceback of an error")


def main(config: DemoConfig) -> None:
    with work("loading PyTorch, diffusers and Lightning", announced=False):
        from sd_hyena.distil.larger_run import LargerRun
        from sd_hyena.distil.run_card import Outcome
        from sd_hyena.distil.training import train

    outcomes: dict[str, Outcome] = {}
    for operator in OPERATORS:
        say(f"\n== {operator} ==")
        given = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "steps"}
        schedule = dict(save_every_n_steps=0, validate_every_n_steps=config.n_steps // 2)
        outcomes[operator] = train(
            TrainConfig(
                target=SITE, **given, **schedule, operator=operator, lr=LR, lr_projections=LR, seed=0, ema=0.99
            ),
            LargerRun(again="the demo, run again, begins its students anew"),
        )
    files = {operator: outcome.exported for operator, outcome in outcomes.items()}
    images, picture = _compared(config, files)
    errors = {o: outcome.metrics[f"val/relative_mse/{SITE}"] for o, outcome in outcomes.items()}

    print(
        f"\n{SITE} at {config.width} px, {config.n_steps} steps of batch {config.batch_size} each, held-out states and captions"
    )
    print(f"{'student':<15}{'parameters':>11}{'relative error':>16}{'of pointwise':>14}{'PSNR dB':>9}{'SSIM':>7}")
    for operator, (psnr, ssim) in images.items():
        share = errors[operator] / errors["pointwise"]
        size = _parameters(files[operator])
        print(f"{operator:<15}{size:>11,}{errors[operator]:>16.4f}{share:>14.2f}{psnr:>9.1f}{ssim:>7.3f}")
    print("below 1.00 of pointwise a student has learnt to mix; images are compared on the same seeds\n")
    _print_block_times([factor * config.width for factor in BLOCK_SIZES])
    print(f"\nside by side: {picture}\nwatch: tensorboard --logdir {for_a_shell(config.log_dir)}")
    size = f"-W {config.width}"
    print(f"next: python -m sd_hyena train -t {SITE} {size}, then python -m sd_hyena generate -y out/hyena.pt {size}")


def _parameters(file: Path) -> int:
    """Parameters of the students in a file, without the stored positions of 1-D filters."""
    from sd_hyena.students.checkpoint import load_students

    students = load_students(file).students.values()
    return sum(p.numel() for s in students for name, p in s.named_parameters() if not name.endswith("pos_emb.z"))


def _compared(config: DemoConfig, files: dict[str, Path]) -> tuple[dict[str, tuple[float, float]], Path]:
    """Mean PSNR and SSIM to the teacher over held-out prompts, and a picture: a row each, teacher first."""
    from PIL import Image, ImageDraw

    from sd_hyena.files.comparison import similarity
    from sd_hyena.files.picture import write_image
    from sd_hyena.generate.engine import Engine
    from sd_hyena.generate.watch import Unannounced
    from sd_hyena.models.example_prompts import prompts_of

    prompts = prompts_of(SHIPPED_MODEL)[-IMAGES:]  # the first ones were trained on
    settings = [
        GenerateConfig(
            prompt=p,
            width=config.width,
            cfg_scale=3.0,
            steps=config.steps,
            seed=100 + i,
            num_images=1,
            device="cpu",
            grow="off",
        )
        for i, p in enumerate(prompts)
    ]
    engine = Engine()

    def row(students: str) -> list[np.ndarray]:
        images = []
        for one in settings:
            drawing = engine.draw(dataclasses.replace(one, hyena=students), Unannounced())
            images += [np.array(drawn.image) for drawn in drawing]
            shown.to(shown.done + 1)
        return images

    with work("teacher and students draw the same pictures", IMAGES * (1 + len(files))) as shown:
        rows = {"teacher": row("")} | {operator: row(str(path)) for operator, path in files.items()}
    scores = {
        operator: tuple(
            np.mean([similarity(a, b) for a, b in zip(rows["teacher"], rows[operator], strict=True)], axis=0)
        )
        for operator in files
    }
    grid = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows.values()], axis=0))
    pen = ImageDraw.Draw(grid)
    for i, name in enumerate(rows):
        pen.text((6, i * config.width + 4), name, fill="white", stroke_width=2, stroke_fill="black")
    folder = Path(config.out_dir)
    path = write_image(folder / "side-by-side.png", grid, "\n".join(prompts), {"prompts": prompts, "rows": list(rows)})
    return scores, path


def _print_block_times(sides: list[int]) -> None:
    """Attention against Hyena as SD 1.5 has them at IN01 (320 channels, 8 heads), random weights, this machine."""
    import torch
    from diffusers.models.attention_processor import Attention

    from sd_hyena.cost.timing import block_seconds
    from sd_hyena.sites import Site
    from sd_hyena.students.student import build_student, spec_for

    site, config = Site("IN01", "IN01", channels=320, heads=8, level=0), TrainConfig()
    print(f"one SD 1.5 block (IN01: 320 channels, 8 heads), {torch.get_num_threads()} thread(s), float32, one image")
    print(f"{'size':<10}{'tokens':>8}{'attention ms':>14}{'Hyena2d ms':>12}{'ratio':>7}")
    for side in sides:
        h = side // 8
        attention = Attention(320, heads=8, dim_head=40).eval()
        student = build_student(spec_for(site, config.operator, config.options_of_operator(), (h, h))).eval()
        with work(f"timing at {side} px"):
            a, s = block_seconds(attention, student, (h, h), batch=1, rounds=3)
        print(f"{side:<10}{h * h:>8}{a * 1e3:>14.1f}{s * 1e3:>12.1f}{a / s:>7.1f}")


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(DemoConfig, main, arguments)


if __name__ == "__main__":
    sys.exit(command())
