"""Every option of train.py and generate.py, declared once: its flag, default, help and rule.

How a config comes of flags and files is in options.py.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd_hyena import given_path
from sd_hyena.errors import BadInput
from sd_hyena.file_names import check_format
from sd_hyena.options import option
from sd_hyena.rules import LARGEST_SIDE, at_least, between, check_seed, check_size, check_text
from sd_hyena.sampler import KARRAS, SAMPLERS

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "examples" / "tiny_sd" / "model"
Operator = Literal["hyena2d", "bidirectional", "causal", "safari", "landmarks", "linear", "windows", "pointwise"]
Source = Literal["samples", "trajectories", "images", "latents", "noise"]
Scheduler = Literal[tuple(SAMPLERS)]
OPTIMIZATIONS = (
    "bf16",
    "channels_last",
    "sdpa",
    "qkv",
    "int8",
    "compile",
    "graphs",
    "halves",
)  # in the order of taking
DType = Literal["auto", "float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Distil self-attentions of a Stable Diffusion checkpoint into Hyena operators; watch it in TensorBoard."""

    teacher_model: str = option(
        "",
        "the teacher: diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
        free=True,
        path=given_path.model,
    )
    vae: str = option("", "another VAE for it: diffusers folder, .safetensors or .ckpt file", path=given_path.vae)
    target: str = option(
        "IN01",
        "sites: names (IN01,OUT11), level0, level1, all, a pattern (OUT*), or auto: chosen by a short pilot",
        "-t",
    )
    max_error: float = option(0.0, "of -t auto: the largest relative error of a site's pilot; 0 means any", free=True)
    budget: str = option("", "of -t auto: how many times cheaper the UNet is to become, e.g. 4x", free=True)
    operator: Operator = option(
        "hyena2d",
        "what stands in for attention; bidirectional, causal and safari (as published) are one-dimensional; landmarks is "
        "hyena2d's content branch alone; linear and windowed attention, and pointwise, which mixes nothing, are baselines",
    )
    stage: Literal["layerwise", "joint", "end_to_end"] = option(
        "layerwise", "layerwise: each site by itself; joint: all together inside the UNet; end_to_end: its prediction"
    )
    feature_weight: float = option(0.1, "of the sites' outputs beside the prediction in end_to_end")
    guidance_weight: float = option(0.5, "of the guided prediction, at scales from 1 to 10, in end_to_end")
    hyena2d_local: int = option(9, "side of the explicit filter; 0 leaves it out")
    hyena2d_long: Literal["full", "separable", "axial_1d", "none"] = option(
        "none", "the filter over the plane: by FFT, as a sum of products, along rows plus columns; none leaves it out"
    )
    hyena2d_rank: int = option(4, "products in a separable filter")
    hyena2d_reach: int = option(64, "the farthest offset of the filter, in cells")
    hyena2d_groups: int = option(0, "filters of the long branch; 0 means one for each channel")
    hyena2d_filter_order: int = option(32, "width of the filter's MLP")
    hyena2d_content: Literal["landmarks", "hedgehog", "elu", "none"] = option(
        "landmarks", "attention by way of landmarks, or linear attention with this feature map; none leaves it out"
    )
    landmarks: int = option(128, "of a head, in hyena2d and landmarks")
    hyena2d_window: int = option(0, "side of the windows of an additional softmax attention; 0 leaves it out")
    hyena2d_gates: Literal["diagonal", "dense"] = option("diagonal", "a factor per channel, or a 1x1 convolution")
    hyena2d_norm: bool = option(True, "normalise the gated product and the output")
    hyena_order: int = option(2, "of the 1-D operators: gates and long convolutions in turn, order - 1 of them")
    hyena_filter_order: int = option(64, "width of the filter's MLP")
    hyena_num_blocks: int = option(1, "must be 1: with more, the published filter wraps around")
    hyena_num_heads: int = option(1, "must be 1: the published operator crashes on more")
    hyena_short_filter_order: int = option(3, "taps of the short convolution on each stream")
    hyena_emb_dim: int = option(33, "positional features of the filter, odd; safari's default of 3 has one frequency")
    hyena_w: float = option(3.0, "initial frequency of the filter's sines; safari's default is 1")
    width: int = option(512, "image width in pixels, a multiple of 8", "-W")
    height: int = option(0, "image height; 0 means as the width", "-H")
    batch_size: int = option(16, "samples in a step, over all devices", "-b")
    micro_batch_size: int = option(
        0,
        "samples at once on each device, the rest accumulated; 0 means all, halved on out-of-memory on one device",
        free=True,
    )
    lr: float = option(2e-3, "learning rate (the ancestor's 1e-5 trains nothing on real activations)", "-r", free=True)
    lr_projections: float = option(0.0, "learning rate of the projections' change; 0 means a tenth of lr", free=True)
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate after the warm-up", free=True)
    warmup_steps: int = option(20, "steps of linear warm-up", free=True)
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "largest gradient norm; 0 turns clipping off", free=True)
    ema: float = option(0.0, "decay of the averaged weights, e.g. 0.99; 0 turns averaging off")
    n_steps: int = option(200, "training steps", "-n", free=True)
    save_every_n_steps: int = option(40, "0 saves only at the end", "-s", free=True)
    keep: int = option(3, "how many checkpoints stay", free=True)
    validate_every_n_steps: int = option(50, "0 validates only at the start and the end", free=True)
    data: Source = option(
        "samples",
        "samples: images the teacher drew; trajectories: states it met while drawing; noise: a baseline",
    )
    data_path: str = option("", "the folder for --data images, the .safetensors file for --data latents")
    prompts: str = option(
        "",
        "text file, one prompt a line; default: the model's own list, or a list for natural images",
        path=given_path.plain_file,
    )
    num_samples: int = option(32, "images the teacher draws for --data samples and trajectories, once; they are cached")
    sample_steps: int = option(20, "denoising steps of each of them")
    cfg_scale: float = option(5.0, "their guidance", "-c")
    log_dir: str = option("logs", "TensorBoard and CSV go to LOG_DIR/RUN", "-l", free=True, path=given_path.folder)
    out_dir: str = option(
        "out", "config, checkpoints and students go to OUT_DIR/RUN", "-o", free=True, path=given_path.folder
    )
    cache_dir: str = option("", "what the teacher drew for training goes there; default: OUT_DIR/cache", free=True)
    name_format: str = option("Hyena-{s:05d}", "name of a saved student, {s} is the step", "-f", free=True)
    seed: int = option(-1, "-1 draws one and records it", "-d")
    pretrained_weight: str = option("", "a student to start from", "-p", path=given_path.plain_file)
    resume: str = option(
        "", "auto: go on with the newest run of OUT_DIR; or a checkpoint's path", free=True, path=given_path.run
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = option(
        "auto", "auto: bf16 where the device has it", free=True
    )
    device: str = option("auto", "auto, cpu, cuda, mps", free=True)
    devices: int = option(1, "how many of them share the batch, each with a process of its own", free=True)
    num_nodes: int = option(
        1,
        "machines with so many devices each; start it on each with MASTER_ADDR, MASTER_PORT, NODE_RANK set",
        free=True,
    )
    strategy: Literal["auto", "ddp"] = option("auto", "Lightning's; auto: ddp on several devices", free=True)
    dtype: DType = option("auto", "of the teacher; auto: bfloat16 on a GPU that has it, else float16", free=True)
    dry_run: bool = option(False, "one step, one save, one reload and the estimate, then stop", free=True)
    allow_huge: bool = option(False, f"lift the limit of {LARGEST_SIDE} pixels a side", free=True)
    debug: bool = option(False, "show the traceback of an error", free=True)

    def __post_init__(self):
        object.__setattr__(self, "height", self.height or self.width)
        check_size(self)
        counts = ("landmarks", "batch_size", "n_steps", "num_samples", "sample_steps", "keep", "devices", "num_nodes")
        at_least(self, 1, *counts)
        at_least(self, 0, "save_every_n_steps", "validate_every_n_steps", "warmup_steps", "micro_batch_size")
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

    @property
    def processes(self) -> int:
        """Which share the batch, one for each device."""
        return self.devices * self.num_nodes

    def operator_options(self) -> dict[str, Any]:
        """The options of the operator by their names in `safari`."""
        prefix = {"hyena2d": "hyena2d_"} | dict.fromkeys(("causal", "bidirectional", "safari"), "hyena_")
        shared = {"landmarks": self.landmarks} if self.operator in ("hyena2d", "landmarks") else {}
        if self.operator not in prefix:
            return shared
        own, names = prefix[self.operator], (f.name for f in dataclasses.fields(self))
        return {name.removeprefix(own): getattr(self, name) for name in names if name.startswith(own)} | shared


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate images with trained students swapped in for self-attentions."""

    model: str = option(
        "",
        "diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
        path=given_path.model,
    )
    vae: str = option("", "another VAE for it: diffusers folder, .safetensors or .ckpt file", path=given_path.vae)
    hyena: str = option(
        "",
        "trained students; a,b are alternatives numbered by {h}, a+b are used together",
        "-y",
        path=given_path.students,
    )
    target: str = option("IN01", "the site of a file that does not say (the ancestor's)", "-t")
    prompt: str | None = option(
        None, "(more:1.2) [less] BREAK, of any length; default: the model's first example prompt", "-p"
    )
    negative_prompt: str = option("", "what to avoid; guidance works without it", "-q")
    clip_skip: int = option(
        1, "the layer of the text encoder to read, from the last, 1; SDXL reads the second by itself"
    )
    embeddings: str = option(
        "",
        "textual inversions: files (word.pt, word.safetensors) and folders, separated by commas",
        path=given_path.embeddings,
    )
    width: int = option(512, "image width in pixels, a multiple of 8", "-W")
    height: int = option(0, "image height; 0 means as the width", "-H")
    num_images: int = option(4, "images in an iteration", "-n")
    batch_size: int = option(1, "images at once; image i does not depend on it, to the last bit only at 1", "-b")
    steps: int = option(30, "denoising steps", "-s")
    cfg_scale: float = option(7.0, "guidance; 0 turns it off", "-c")
    iteration: int = option(1, "how often; NUM_IMAGES x ITERATION images in all", "-i")
    seed: int = option(-1, "of the first image, image i has seed + i; -1 draws one and records it", "-k")
    scheduler: Scheduler = option("ddim", "sampler")
    karras: bool = option(False, "Karras' noise levels (euler, heun, lms, dpm++, unipc)")
    out_dir: str = option("./", "where the images go", "-o", path=given_path.folder)
    name_format: str = option(
        "image_{n:03d}", "{h} hyena file, {n} image, {b} iteration, {i} image in the iteration", "-f"
    )
    compare: bool = option(False, "also write teacher | student | difference, with PSNR and SSIM")
    from_image: str = option(
        "", "repeat an image of ours or a PNG of A1111: its options, with other flags on top", "--from"
    )
    init_image: str = option("", "picture to start from, resized to WIDTH x HEIGHT", path=given_path.plain_file)
    strength: float = option(0.6, "how much of it is drawn anew, 0 to 1")
    noise_inversion: int = option(
        0, "steps that look for the noise that INIT_IMAGE itself comes from, so that it is kept, e.g. 10; 0: any noise"
    )
    retouch: float = option(1.0, "of the noise inversion: above 1 smooths, 3 for drawings")
    renoise_strength: float = option(1.0, "of the noise inversion: fresh noise where the picture is smooth, 0 to 2")
    renoise_kernel: int = option(64, "of the noise inversion: radius in px that counts as smooth")
    mask: str = option("", "white where the picture is drawn anew (inpainting)", path=given_path.plain_file)
    control_image: str = option(
        "", "picture that the ControlNet reads: edges, depth, ...; of several a,b", path=given_path.pictures
    )
    controlnet: str = option("", "diffusers folder of a ControlNet; several a,b", path=given_path.controlnets)
    control_scale: float | str = option(1.0, "how strongly it acts; of several 1,0.5 or one for all")
    lora: str = option("", "LoRA files, a.safetensors:0.8,b.safetensors", path=given_path.loras)
    tiled_diffusion: Literal["off", "auto", "multidiffusion", "mixture", "spot"] = option(
        "auto", "draw in tiles and fuse their predictions; auto: above 2048 px, and what does not fit in one piece"
    )
    tile_width: int = option(0, "of a tile in latent cells of 8 px; 0 chooses: 96, with students 256")
    tile_height: int = option(0, "likewise")
    overlap: int | None = option(None, "cells that tiles share; default: half a tile, with spot none")
    tile_batch_size: int = option(4, "tiles at once")
    regions: str = option(
        "",
        "JSON file of rectangles with their own prompts (bbox_controls), or a PNG of ours",
        path=given_path.plain_file,
    )
    draw_background: bool = option(False, "draw tiles below the regions too")
    tiled_vae: Literal["off", "auto", "exact", "fast", "two_pass", "classic", "blend"] = option(
        "auto", "how the VAE works in tiles; exact changes nothing; auto: exact above 1024 px"
    )
    encoder_tile_size: int = option(0, "tile of the VAE's encoder in px; 0: by free memory")
    decoder_tile_size: int = option(0, "tile of its decoder in latent cells; 0: by free memory")
    color_fix: bool = option(False, "true colours for the fast encoder")
    hypertile: int = option(
        0, "HyperTile: split the attentions that stay into tiles of so many px, e.g. 256; 0 does not"
    )
    hypertile_swap: int = option(2, "how many tilings take turns")
    hypertile_depth: int = option(0, "levels that are split, from the finest: 0 to 3")
    attn_shape: Literal["off", "brick", "tile", "shifted"] = option("off", "LargeResPatch: attention in 64x64 bricks")
    ff_chunk_size: int = option(0, "tokens at once in the feed-forward layers, e.g. 4096; 0: all")
    attention_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = option(
        "auto", "PyTorch's kernel for the attentions that stay"
    )
    optimize: str = option(
        "",
        "steps, separated by commas: bf16, channels_last, sdpa, qkv (fused projections), int8 (torchao), compile, "
        "graphs (of a GPU's launches), halves (the sides of guidance in turn)",
    )
    keep_attention: str = option(
        "",
        "sites that keep their attention although there is a student; auto: where it is measured to be faster at this size",
    )
    device: str = option("auto", "auto, cpu, cuda, mps")
    offload: Literal["off", "model", "group", "sequential"] = option(
        "off",
        "weights wait in the computer's memory: whole networks (model), or single layers, slower and in less memory of "
        "the GPU (group, sequential)",
    )
    dtype: DType = option("auto", "auto: float16 on a GPU")
    allow_huge: bool = option(False, f"lift the limit of {LARGEST_SIDE} pixels a side")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        object.__setattr__(self, "height", self.height or self.width)
        check_size(self)
        at_least(self, 1, "num_images", "batch_size", "steps", "iteration", "clip_skip")
        at_least(self, 0, "tile_width", "tile_height", "encoder_tile_size", "decoder_tile_size", "hypertile")
        between(self, 0, 1e3, "cfg_scale")
        between(self, 0, 1, "strength")
        check_seed(self.seed)
        check_format(self.name_format, "nhbi")
        check_text(self, "prompt", "negative_prompt")
        for needy, needed in (
            ("mask", "init_image"),
            ("noise_inversion", "init_image"),
            ("control_image", "controlnet"),
            ("controlnet", "control_image"),
        ):
            if getattr(self, needy) and not getattr(self, needed):
                raise BadInput(f"{needy}={getattr(self, needy)!r} needs --{needed} too")
        if self.init_image and not int(self.steps * self.strength):
            raise BadInput(f"strength={self.strength:g} of steps={self.steps} leaves no step; raise one of them")
        if self.karras and self.scheduler not in KARRAS:
            raise BadInput(f"karras: {self.scheduler} has no Karras noise levels; use {', '.join(KARRAS)}")
        if len(self.controls) != len(given_path.several(self.control_image)):
            raise BadInput(
                f"control_image={self.control_image!r} must be as many pictures as controlnet={self.controlnet!r} has folders"
            )
        for step in self.optimizations:
            if step not in OPTIMIZATIONS:
                raise BadInput(f"optimize={step!r} is none of {', '.join(OPTIMIZATIONS)}")
        replacing = [step for step in self.optimizations if step not in ("bf16", "sdpa", "halves")]
        if replacing and self.offload != "off":
            raise BadInput(f"optimize={replacing[0]} needs weights that stay where they are; use it with --offload off")
        if self.keep_attention == "auto" and self.offload != "off":
            raise BadInput("keep_attention=auto measures where the weights stay; with --offload name the sites instead")
        if self.lora and {"qkv", "int8"} & set(self.optimizations):
            raise BadInput("optimize=qkv and int8 replace the weights that a LoRA changes; leave them out, or the LoRA")
        if "bf16" in self.optimizations and self.dtype not in ("auto", "bfloat16"):
            raise BadInput(f"optimize=bf16 and dtype={self.dtype} contradict each other; leave one away")

    @property
    def controls(self) -> list[tuple[str, float]]:
        """Folder and strength of each ControlNet. Raises BadInput."""
        folders = given_path.several(self.controlnet)
        try:
            scales = [float(part) for part in str(self.control_scale).split(",")]
        except ValueError:
            scales = [-1.0]
        if not all(0 <= scale <= 1000 for scale in scales) or len(scales) not in (1, len(folders)):
            raise BadInput(
                f"control_scale={self.control_scale!r} must be a number from 0 to 1000, or one for each ControlNet: 1,0.5"
            )
        return list(zip(folders, scales if len(scales) > 1 else scales * len(folders), strict=True))

    @property
    def optimizations(self) -> tuple[str, ...]:
        """The steps of `optimize`."""
        return tuple(filter(None, (part.strip() for part in self.optimize.split(","))))
