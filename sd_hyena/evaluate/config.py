"""Every option of an evaluation, declared once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from sd_hyena.errors import BadInput
from sd_hyena.evaluate.judge import judge_of
from sd_hyena.options import given_path
from sd_hyena.options.command_line import option, with_paths
from sd_hyena.options.rules import LARGEST_SIDE, DType

WHAT, SIZE, WHERE, SPEED, EXPERT = GROUPS = (
    "what",
    "sizes and steps",
    "where it goes",
    "memory and speed",
    "expert",
)  # of --help, in the order in which people ask


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Measure trained students against their teacher at several sizes."""

    GROUPS: ClassVar[tuple[str, ...]] = GROUPS

    students: str = option(
        "",
        "files of train.py, also as plain arguments; a,b are compared, a+b are used together",
        path=given_path.students,
        beside="students",
        group=WHAT,
    )
    model: str = option(
        "",
        "the teacher: diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
        path=given_path.model,
        group=WHAT,
    )
    sizes: str = option(
        "", "e.g. 256,512,768x384; default: the model's own size, twice that, and a rectangle", group=SIZE
    )
    guidance: str = option("1,5,10", "scales of guidance", group=SIZE)
    images: int = option(
        16, "images at the first size and each scale; fewer at larger sizes, at equal cost", group=SIZE
    )
    states: int = option(16, "held-out states for the errors", group=SIZE)
    steps: int = option(25, "denoising steps of an image", "-s", group=SIZE)
    seed: int = option(10_000, "of the first image and state", "-k", group=SIZE)
    prompts: str = option(
        "",
        "text file, of whose last quarter they are taken, where training takes none; default: the model's own",
        path=given_path.plain_file,
        group=WHAT,
    )
    keep_attention: str = option("", "sites that keep their attention although there is a student", group=WHAT)
    judge: str = option("", "module:function(image, caption) -> bool, whether an image shows its caption", group=WHAT)
    out_dir: str = option("out/evaluation", "where the report goes", "-o", path=given_path.folder, group=WHERE)
    cache_dir: str = option(
        "",
        "pictures that were drawn are kept there; default: cache beside OUT_DIR",
        path=given_path.folder,
        group=WHERE,
    )
    device: str = option("auto", "auto, cpu, cuda, mps", group=SPEED)
    dtype: DType = option("auto", "auto: float16 on a GPU", group=SPEED)
    debug: bool = option(False, "show the traceback of an error", group=EXPERT)

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


def checked(config: EvaluationConfig) -> EvaluationConfig:
    """The config with the paths of what it names, once all was looked at that can be told without torch. Raises BadInput."""
    config = with_paths(config)
    if not config.students:
        raise BadInput("no students given; name a file of train.py, e.g. out/hyena.pt")
    judge_of(config.judge)
    return config
