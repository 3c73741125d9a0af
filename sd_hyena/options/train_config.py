"""Every option of train.py, declared once: its flag, default, help and rule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from sd_hyena.errors import BadInput
from sd_hyena.files.names import check_format
from sd_hyena.options import former, given_path
from sd_hyena.options.command_line import option
from sd_hyena.options.operators import OPERATORS, listing, operator_named
from sd_hyena.options.rules import LARGEST_SIDE, NOISE_LEVELS, DType, at_least, between, check_seed, check_size

NEWEST = "hyena"  # the name of the newest students in OUT_DIR
Source = Literal["samples", "trajectories", "images", "latents", "noise"]


WHAT, SIZE, WHERE, DATA, STUDENT, SPEED, EXPERT = GROUPS = (
    "what",
    "size and steps",
    "where it goes",
    "data",
    "the student",
    "memory and speed",
    "expert",
)  # of --help, in the order in which people ask


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Distil self-attentions of a Stable Diffusion checkpoint into Hyena operators; watch it in TensorBoard."""

    GROUPS: ClassVar[tuple[str, ...]] = GROUPS

    teacher_model: str = option(
        "",
        "the teacher: diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
        free=True,
        path=given_path.model,
        group=WHAT,
        common=True,
    )
    vae: str = option(
        "",
        "another VAE for it: diffusers folder, .safetensors or .ckpt file",
        path=given_path.vae,
        beside="vae",
        group=WHAT,
    )
    target: str = option(
        "IN01",
        "sites: IN01,OUT11 or level0, level1, all, OUT* or auto; auto: chosen by a short pilot",
        "-t",
        group=WHAT,
        common=True,
    )
    max_error: float = option(
        0.0, "of -t auto: the largest relative error of a site's pilot; 0 means any", free=True, group=WHAT
    )
    budget: str = option(
        "", "of -t auto: how many times cheaper the UNet is to become, e.g. 4x", free=True, group=WHAT, common=True
    )
    operator: str = option(
        "hyena2d",
        f"what stands in for attention; one of {', '.join(OPERATORS)}, see the list at the end",
        group=STUDENT,
        common=True,
    )
    stage: Literal["layerwise", "joint", "end_to_end"] = option(
        "layerwise",
        "layerwise, joint or end_to_end; each site by itself, all together inside the UNet, or its prediction",
        group=STUDENT,
        common=True,
    )
    feature_weight: float = option(0.1, "of the sites' outputs beside the prediction in end_to_end", group=STUDENT)
    guidance_weight: float = option(
        0.5, "of the guided prediction, at scales from 1 to 10, in end_to_end", group=STUDENT
    )
    operator_options: str = option(
        "",
        "key=value,... of the operator, where they differ from their defaults; the list at the end has them",
        group=STUDENT,
    )
    hyena_order: int = option(
        2, "of the 1-D operators: gates and long convolutions in turn, order - 1 of them", group=EXPERT
    )
    hyena_filter_order: int = option(64, "width of the filter's MLP", group=EXPERT)
    hyena_num_blocks: int = option(1, "must be 1: with more, the published filter wraps around", group=EXPERT)
    hyena_num_heads: int = option(1, "must be 1: the published operator crashes on more", group=EXPERT)
    hyena_short_filter_order: int = option(3, "taps of the short convolution on each stream", group=EXPERT)
    width: int = option(512, "image width in pixels, a multiple of 8", "-W", group=SIZE, common=True)
    height: int = option(0, "image height, 0: as the width", "-H", group=SIZE, common=True)
    batch_size: int = option(16, "samples in a step, over all devices", "-b", group=SIZE, common=True)
    micro_batch_size: int = option(
        0,
        "samples at once on each device, the rest accumulated; 0 means all, halved on out-of-memory on one device",
        free=True,
        group=SPEED,
    )
    lr: float = option(
        2e-3,
        "learning rate; the ancestor's 1e-5 trains nothing on real activations",
        "-r",
        free=True,
        group=SIZE,
        common=True,
    )
    lr_projections: float = option(
        0.0, "learning rate of the projections' change; 0 means a tenth of lr", free=True, group=EXPERT
    )
    schedule: Literal["cosine", "constant"] = option(
        "cosine", "learning rate after the warm-up", free=True, group=EXPERT
    )
    warmup_steps: int = option(20, "steps of linear warm-up", free=True, group=EXPERT)
    weight_decay: float = option(0.0, "of AdamW", group=EXPERT)
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", free=True, group=EXPERT)
    ema: float = option(0.0, "decay of the averaged weights, e.g. 0.99; 0 turns averaging off", group=EXPERT)
    n_steps: int = option(200, "training steps", "-n", free=True, group=SIZE, common=True)
    save_every_n_steps: int = option(40, "0 saves only at the end", "-s", free=True, group=WHERE)
    keep: int = option(3, "how many checkpoints stay, and as many students in the run's folder", free=True, group=WHERE)
    validate_every_n_steps: int = option(50, "0 validates only at the start and the end", free=True, group=SIZE)
    data: Source = option(
        "samples",
        "what the students learn from; samples: images the teacher drew; trajectories: states it met while drawing; noise: a baseline",
        group=DATA,
        common=True,
    )
    data_path: str = option(
        "", "folder for --data images, .safetensors file for --data latents", group=DATA, common=True
    )
    prompts: str = option(
        "",
        "text file, one prompt a line; default: the model's own list, or a list for natural images",
        path=given_path.plain_file,
        group=DATA,
        common=True,
    )
    num_samples: int = option(
        32,
        "images the teacher draws for it; with --data samples and trajectories, once: they are cached",
        group=DATA,
        common=True,
    )
    draw_at_once: int = option(
        0,
        "how many of them at once; 0: one on a CPU, 4 on a GPU; halved on out-of-memory, as many are lost by a crash",
        free=True,
        group=DATA,
    )
    sample_steps: int = option(20, "denoising steps of each of them", group=DATA)
    cfg_scale: float = option(5.0, "their guidance", "-c", group=DATA)
    log_dir: str = option(
        "logs",
        "TensorBoard and CSV go to LOG_DIR/RUN",
        "-l",
        free=True,
        path=given_path.folder,
        group=WHERE,
        common=True,
    )
    out_dir: str = option(
        "out",
        "config, checkpoints and students go to OUT_DIR/RUN",
        "-o",
        free=True,
        path=given_path.folder,
        group=WHERE,
        common=True,
    )
    cache_dir: str = option(
        "", "what the teacher drew for training goes there; default: OUT_DIR/cache", free=True, group=WHERE
    )
    name_format: str = option("Hyena-{s:05d}", "name of a saved student, {s} is the step", "-f", free=True, group=WHERE)
    name: str = option(
        "",
        "OUT_DIR/NAME.safetensors and .pt hold the students too; beside OUT_DIR/hyena",
        free=True,
        group=WHERE,
        common=True,
    )
    sample_prompts: str = option(
        "",
        "text file, one prompt a line: the pictures in TensorBoard; default: four of those not trained on",
        free=True,
        path=given_path.plain_file,
        group=WHERE,
    )
    seed: int = option(-1, "-1 draws one and records it", "-d", group=SIZE)
    pretrained_weight: str = option(
        "", "a student to start from", "-p", path=given_path.plain_file, beside="students", group=STUDENT, common=True
    )
    resume: str = option(
        "",
        "go on with a run: its folder, or auto for the newest of OUT_DIR; or a checkpoint's path",
        free=True,
        path=given_path.run,
        group=WHERE,
        common=True,
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = option(
        "auto", "auto: bf16 where the device has it", free=True, group=SPEED
    )
    device: str = option("auto", "auto, cpu, cuda, mps", free=True, group=SPEED, common=True)
    devices: int = option(1, "how many of them share the batch, each with a process of its own", free=True, group=SPEED)
    num_nodes: int = option(
        1,
        "machines with so many devices each; start it on each with MASTER_ADDR, MASTER_PORT, NODE_RANK set",
        free=True,
        group=SPEED,
    )
    strategy: Literal["auto", "ddp"] = option(
        "auto", "Lightning's; auto: ddp on several devices", free=True, group=SPEED
    )
    dtype: DType = option(
        "auto", "of the teacher; auto: bfloat16 on a GPU that has it, else float16", free=True, group=SPEED
    )
    dry_run: bool = option(
        False,
        "try it: the estimate, two pictures, one step, one save; one reload, no previews, then stop",
        free=True,
        group=WHAT,
        common=True,
    )
    allow_huge: bool = option(False, f"lift the limit of {LARGEST_SIDE} pixels a side", free=True, group=EXPERT)
    debug: bool = option(False, "show the traceback of an error", free=True, group=EXPERT)

    def __post_init__(self):
        object.__setattr__(self, "height", self.height or self.width)
        operator = operator_named(self.operator)
        object.__setattr__(self, "operator_options", operator.write(operator.read(self.operator_options)))
        check_size(self)
        counts = ("batch_size", "n_steps", "num_samples", "keep", "devices", "num_nodes")
        at_least(self, 1, *counts)
        between(self, 1, NOISE_LEVELS, "sample_steps")
        at_least(
            self, 0, "save_every_n_steps", "validate_every_n_steps", "warmup_steps", "micro_batch_size", "draw_at_once"
        )
        between(self, 0, 1e3, "lr", open_low=True)
        for name in (
            "max_error",
            "lr_projections",
            "weight_decay",
            "clip",
            "cfg_scale",
            "feature_weight",
            "guidance_weight",
        ):
            between(self, 0, 1e3, name)
        between(self, 0, 1, "ema", open_high=True)
        check_seed(self.seed)
        if not self.target.strip(" ,"):
            raise BadInput("target is empty; name a site (IN01), a group (level0, all) or a pattern (OUT*)")
        if (self.max_error or self.budget) and self.target != "auto":
            raise BadInput(f"max_error and budget choose sites for -t auto, but target={self.target!r} names them")
        if self.target == "auto" and not (self.max_error or self.budget):
            raise BadInput("target=auto needs --max_error E or --budget Nx to choose by")
        if self.budget and not re.fullmatch(r"\d+(\.\d+)?x?", self.budget):
            raise BadInput(f"budget={self.budget!r} must be how many times cheaper, e.g. 4x")
        if self.budget and float(self.budget.rstrip("x")) <= 1:
            raise BadInput(f"budget={self.budget!r} must be more than 1x, the UNet as it is")
        if self.target == "auto" and (self.processes > 1 or self.resume or self.pretrained_weight):
            raise BadInput(
                "target=auto runs a pilot first: on one device, without --resume and -p; then name its choice"
            )
        if self.data == "noise" and self.stage != "layerwise":
            raise BadInput(f"data=noise has no pictures, so stage={self.stage} cannot learn from it; use layerwise")
        shared = f"devices={self.devices}" + (f" x num_nodes={self.num_nodes}" if self.num_nodes > 1 else "")
        if self.batch_size % self.processes:
            raise BadInput(f"{shared} must divide batch_size={self.batch_size}")
        if self.micro_batch_size and self.batch_size // self.processes % self.micro_batch_size:
            of = f"batch_size={self.batch_size}" + (f" / {shared}" if self.processes > 1 else "")
            raise BadInput(f"micro_batch_size={self.micro_batch_size} must divide {of}")
        if self.devices > 1 and ":" in self.device:
            raise BadInput(f"device={self.device!r} is one device, but devices={self.devices}; leave the number away")
        if self.data in ("images", "latents") and not (self.data_path and Path(self.data_path).exists()):
            raise BadInput(f"data={self.data} needs data_path; {self.data_path!r} does not exist")
        if self.resume and self.dry_run:
            raise BadInput(
                "resume and dry_run exclude each other: a dry run starts anew and leaves nothing to go on from"
            )
        check_format(self.name_format, "s")
        if self.name and (set(self.name) & set("/\\{}") or self.name.startswith(".")):
            raise BadInput(f"name={self.name!r} names files beside OUT_DIR/hyena.pt: no / \\ {{ }}, no dot in front")
        if self.name:
            check_format(self.name, "s", "name")

    @property
    def processes(self) -> int:
        """Which share the batch, one for each device."""
        return self.devices * self.num_nodes

    def options_of_operator(self) -> dict[str, Any]:
        """All of them by their names in `safari`, but for what the site decides."""
        operator = operator_named(self.operator)
        flags = {name: getattr(self, f"hyena_{name}") for name in operator.ancestors}
        return flags | operator.defaults() | operator.read(self.operator_options)

    def in_full(self) -> dict[str, str]:
        """What is stored with all its defaults."""
        operator = operator_named(self.operator)
        return {"operator_options": operator.write(operator.read(self.operator_options), in_full=True)}

    @staticmethod
    def epilog() -> str:
        """The end of `--help_all`."""
        return listing()

    FORMER: ClassVar[dict[str, str]] = dict.fromkeys(former.FORMER, "operator_options")

    @classmethod
    def translated(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Stored options without those of the last release that the operator has now. Raises BadInput."""
        return former.translated(values, cls.operator)

    @staticmethod
    def former_type(name: str) -> type:
        return former.former_type(name)

    def note_former(self, names: tuple[str, ...]) -> None:
        former.note(names, self.operator_options)
