"""Every option of generate.py, declared once: its flag, default, help and rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from sd_hyena.errors import BadInput
from sd_hyena.files.framed import Resize
from sd_hyena.files.names import check_format
from sd_hyena.files.pixels import picture_size
from sd_hyena.options import given_path, grow_options
from sd_hyena.options.canvas import canvas, scaled
from sd_hyena.options.command_line import option
from sd_hyena.options.own_defaults import own_defaults
from sd_hyena.options.prompt_constructs import check_constructs
from sd_hyena.options.rules import (
    ABSURD_SIDE,
    LARGEST_SCALE,
    LARGEST_SIDE,
    NOISE_LEVELS,
    DType,
    at_least,
    between,
    check_seed,
    check_size,
    check_text,
)
from sd_hyena.options.sampler import KARRAS, SAMPLERS

Scheduler = Literal[tuple(SAMPLERS)]
BEFORE = "the stage before"  # as init_image: the picture that a growing canvas is drawn from, at its size
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


LARGEST_WEBP = 16383
MODELS = "the model's"
WHAT, SIZE, WHERE, LARGE, BESIDE, SPEED, EXPERT = GROUPS = (
    "what",
    "size and steps",
    "where it goes",
    "large pictures",
    "beside: LoRA, ControlNet, embeddings",
    "memory and speed",
    "expert",
)  # of --help, in the order in which people ask


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generate images with trained students swapped in for self-attentions."""

    GROUPS: ClassVar[tuple[str, ...]] = GROUPS

    # What is shown as "the model's" is 0 or None until `filled` looks there.
    model: str = option(
        "",
        "diffusers folder, .safetensors or .ckpt file; default: the small one that ships",
        "-m",
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
    hyena: str = option(
        "",
        "trained students, or landmarks, which need no training; files or names beside the model, landmarks:level0, "
        "landmarks:128 (else up to 256 of a head, as many as pay at the size); a,b are alternatives numbered by {h}, "
        "a+b are used together",
        "-y",
        path=given_path.students,
        beside="students",
        group=WHAT,
        common=True,
    )
    target: str = option(
        "IN01", "the site of a file that does not say (the ancestor's)", "-t", needs="hyena", group=WHAT
    )
    prompt: str | None = option(
        None,
        "what to draw: (more:1.2) [less] BREAK, of any length; @FILE draws each line of a text file, flags behind -- in it; "
        "default: the model's example; beside --init_image that "
        "picture's own prompt",
        "-p",
        group=WHAT,
        common=True,
    )
    negative_prompt: str = option(
        "", "what to avoid; guidance works without it", "-q", needs="cfg_scale", group=WHAT, common=True
    )
    clip_skip: int = option(
        1, "the layer of the text encoder to read, from the last, 1; SDXL reads the second by itself", group=WHAT
    )
    embeddings: str = option(
        "",
        "textual inversions: files (word.pt, word.safetensors) and folders, separated by commas",
        path=given_path.embeddings,
        beside="embeddings",
        group=BESIDE,
    )
    width: int = option(
        0,
        "image width in pixels, a multiple of 8; beside --init_image in that picture's shape",
        "-W",
        group=SIZE,
        common=True,
        shown=MODELS,
    )
    height: int = option(
        0,
        "image height, 0: as the width; beside --init_image in that picture's shape",
        "-H",
        group=SIZE,
        common=True,
        shown="",
    )
    scale: float = option(
        0.0,
        "in place of both: the size as a multiple of the picture's behind --init_image or --from, e.g. 2",
        group=SIZE,
        shown="",
    )
    num_images: int = option(4, "images in an iteration", "-n", group=SIZE, common=True)
    batch_size: int = option(
        1, "images at once; image i does not depend on it, to the last bit only at 1", "-b", group=SIZE
    )
    steps: int = option(0, "denoising steps", "-s", group=SIZE, common=True, shown=MODELS)
    cfg_scale: float | None = option(None, "guidance, 0 turns it off", "-c", group=SIZE, common=True, shown=MODELS)
    iteration: int = option(1, "how often; NUM_IMAGES x ITERATION images in all", "-i", group=SIZE)
    seed: int = option(
        -1, "of the first image, -1 draws one and records it; image i has seed + i", "-k", group=SIZE, common=True
    )
    scheduler: Scheduler = option("ddim", "sampler", group=SIZE, common=True)
    karras: bool = option(False, "Karras' noise levels (euler, heun, lms, dpm++, unipc)", group=SIZE)
    out_dir: str = option(
        "outputs", "where the images go; made if need be", "-o", path=given_path.folder, group=WHERE, common=True
    )
    name_format: str = option(
        "image_{n:03d}",
        "{h} hyena file, {n} image, on from those in OUT_DIR, {b} iteration, {i} image in the iteration",
        "-f",
        group=WHERE,
    )
    format: Literal["png", "webp", "jpg"] = option(
        "png", "of the files; webp and jpg lose a little (quality 95), but no parameters", group=WHERE
    )
    grid: bool = option(
        False,
        "also write all pictures in a labelled grid: a row for each prompt, a column for each of -y a,b",
        group=WHERE,
    )
    compare: bool = option(
        False, "also write teacher | student | difference, with PSNR and SSIM", needs="hyena", group=WHERE, common=True
    )
    from_image: str = option(
        "",
        "repeat an image: its options, with other flags on top; of A1111, ComfyUI, InvokeAI as far as it goes",
        "--from",
        group=WHAT,
        common=True,
    )
    init_image: str = option(
        "",
        "picture to start from; without -p by its own prompt, without -W and -H in its shape",
        path=given_path.plain_file,
        group=WHAT,
        common=True,
    )
    resize: Resize = option(
        "crop",
        "where it has another shape than -W and -H: its middle; fit: all, its edges drawn out; or stretch",
        needs="init_image",
        group=WHAT,
    )
    upscaler: str = option(
        "",
        "a model that enlarges INIT_IMAGE before it is drawn again, and what grows; of ESRGAN, Real-ESRGAN, SwinIR, DAT and the like; "
        "default: Lanczos",
        path=given_path.upscaler,
        beside="upscalers",
        needs="init_image|grow:enlarging",
        group=LARGE,
    )
    strength: float = option(0.6, "how much of it is drawn anew, 0 to 1", needs="init_image", group=WHAT, common=True)
    noise_inversion: int = option(
        0,
        "steps that look for the noise that INIT_IMAGE itself comes from, so that it is kept, e.g. 10; 0: any noise",
        group=WHAT,
    )
    retouch: float = option(
        1.0, "of the noise inversion: above 1 smooths, 3 for drawings", needs="noise_inversion", group=WHAT
    )
    renoise_strength: float = option(
        1.0,
        "of the noise inversion: fresh noise where the picture is smooth, 0 to 2",
        needs="noise_inversion",
        group=WHAT,
    )
    renoise_kernel: int = option(
        64, "of the noise inversion: radius in px that counts as smooth", needs="noise_inversion", group=WHAT
    )
    mask: str = option(
        "",
        "white where the picture is drawn anew (inpainting); docs/models.md says how transparency is read",
        path=given_path.plain_file,
        group=WHAT,
    )
    control_image: str = option(
        "",
        "picture that the ControlNet reads: edges, depth, ...; of several a,b",
        path=given_path.pictures,
        group=BESIDE,
        common=True,
    )
    controlnet: str = option(
        "",
        "a ControlNet: diffusers folder, .safetensors or .pth file; several a,b",
        path=given_path.controlnets,
        group=BESIDE,
        common=True,
    )
    control_scale: float | str = option(
        1.0, "how strongly it acts; of several 1,0.5 or one for all", needs="controlnet", group=BESIDE
    )
    lora: str = option(
        "",
        "LoRA files, a.safetensors:0.8,b.safetensors",
        path=given_path.loras,
        beside="loras",
        group=BESIDE,
        common=True,
    )
    lora_dir: str = option(
        "", "folders in which <lora:NAME:WEIGHT> of a prompt is looked for", path=given_path.folders, group=BESIDE
    )
    model_dir: str = option(
        "",
        "folders in which the model that a picture behind --from names is looked for, by name or hash",
        path=given_path.folders,
        group=BESIDE,
    )
    vae_dir: str = option("", "likewise its VAE", path=given_path.folders, group=BESIDE)
    embedding_dir: str = option("", "likewise its textual inversions", path=given_path.folders, group=BESIDE)
    grow: Literal["auto", "off", "redraw", "diffusehigh", "demofusion", "deep_shrink", "hidiffusion"] = option(
        "auto",
        "how a large picture stays one picture; auto: the best that was measured, above 1.5 times the model's own size, "
        "where there is no picture to start from and no region; off draws it plainly",
        group=LARGE,
        common=True,
    )
    grow_strength: float = option(
        0.0,
        "how much of the stage before is drawn anew in each, 0 to 1; 0: the method's own",
        needs="grow:stages",
        group=LARGE,
    )
    grow_steps: int = option(
        0, "denoising steps of each stage but the first; 0: STEPS x its strength", needs="grow:stages", group=LARGE
    )
    grow_options: str = option(
        "",
        "key=value,... of the method, where they differ from their defaults; the list at the end has them",
        needs="grow:larger",
        group=LARGE,
    )
    hires: float = option(
        0.0,
        "A1111's hires fix: draw at WIDTH x HEIGHT, then again so many times as large (as --grow redraw); 0 does not",
        group=LARGE,
    )
    save_stages: bool = option(
        False, "also write each stage's picture, as soon as it is done", needs="grow:stages", group=LARGE
    )
    circular: bool = option(
        False, "the picture continues at its opposite sides, as a tile or a panorama of 360 degrees", group=LARGE
    )
    tiled_diffusion: Literal["off", "auto", "multidiffusion", "mixture", "spot"] = option(
        "auto",
        "draw in tiles and fuse their predictions; auto: above 2048 px, and what does not fit in one piece",
        group=LARGE,
        common=True,
    )
    tile_width: int = option(
        0,
        "of a tile in latent cells of 8 px; 0 chooses: 96, with students 256",
        needs="tiled_diffusion|regions",
        group=LARGE,
    )
    tile_height: int = option(0, "likewise", needs="tiled_diffusion|regions", group=LARGE)
    overlap: int | None = option(
        None,
        "cells that tiles share; default: half a tile, with spot none",
        needs="tiled_diffusion|regions",
        group=LARGE,
    )
    tile_batch_size: int = option(4, "tiles at once", needs="tiled_diffusion|regions", group=LARGE)
    tile_weights: Literal["auto", "uniform", "gaussian", "cosine", "ramp"] = option(
        "auto",
        "how much a tile's cells count; auto: gaussian for mixture, else cosine; uniform: MultiDiffusion as published",
        needs="tiled_diffusion|regions",
        group=LARGE,
    )
    regions: str = option(
        "",
        "JSON file of rectangles with their own prompts; in the form of bbox_controls, or a picture that was made with some",
        path=given_path.plain_file,
        group=LARGE,
        common=True,
    )
    draw_background: bool = option(False, "draw tiles below the regions too", needs="regions", group=LARGE)
    tiled_vae: Literal["off", "auto", "exact", "fast", "two_pass", "classic", "blend"] = option(
        "auto", "how the VAE works in tiles; exact changes nothing; auto: exact above 1024 px", group=LARGE
    )
    encoder_tile_size: int = option(
        0, "tile of the VAE's encoder in px; 0: by free memory", needs="tiled_vae+init_image", group=LARGE
    )
    decoder_tile_size: int = option(
        0, "tile of its decoder in latent cells; 0: by free memory", needs="tiled_vae", group=LARGE
    )
    color_fix: bool = option(False, "true colours for the fast encoder", needs="tiled_vae+init_image", group=LARGE)
    hypertile: int = option(
        0, "HyperTile: split self-attentions, and students, into tiles of so many px, e.g. 256; 0 does not", group=SPEED
    )
    hypertile_swap: int = option(2, "how many tilings take turns", needs="hypertile", group=SPEED)
    hypertile_depth: int = option(0, "levels that are split, from the finest: 0 to 3", needs="hypertile", group=SPEED)
    attn_shape: Literal["off", "brick", "tile", "shifted"] = option(
        "off", "LargeResPatch: attention in 64x64 bricks", group=EXPERT
    )
    ff_chunk_size: int = option(0, "tokens at once in the feed-forward layers, e.g. 4096; 0: all", group=SPEED)
    attention_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = option(
        "auto", "PyTorch's kernel for the attentions that stay", group=SPEED
    )
    optimize: str = option(
        "",
        "steps, separated by commas: bf16, channels_last, sdpa, qkv (fused projections), int8 (torchao), compile, "
        "graphs (of a GPU's launches), halves (the sides of guidance in turn)",
        group=SPEED,
    )
    keep_attention: str = option(
        "",
        "sites that keep their attention although there is a student; auto: where it is measured to be faster at this size",
        needs="hyena",
        group=SPEED,
    )
    device: str = option("auto", "auto, cpu, cuda, mps", group=SPEED, common=True)
    offload: Literal["off", "model", "group", "sequential"] = option(
        "off",
        "weights wait in the computer's memory: whole networks (model), or single layers, slower and in less memory of "
        "the GPU (group, sequential)",
        group=SPEED,
    )
    dtype: DType = option("auto", "auto: float16 on a GPU", group=SPEED)
    allow_huge: bool = option(False, f"lift the limit of {LARGEST_SIDE} pixels a side", group=EXPERT)
    debug: bool = option(False, "show the traceback of an error", group=EXPERT)

    def __post_init__(self):
        if not self.init_image and not self.scale:
            object.__setattr__(self, "height", self.height or self.width)
        if given := [name for name in ("width", "height") if getattr(self, name)]:
            check_size(self, *given)
            if self.scale:
                raise BadInput(
                    f"scale={self.scale:g} and {given[0]}={getattr(self, given[0])} contradict each other; leave one away"
                )
        at_least(self, 1, "num_images", "batch_size", "iteration", "clip_skip")
        if self.steps:
            between(self, 1, NOISE_LEVELS, "steps")
        between(self, 0, LARGEST_SCALE, "scale")
        at_least(self, 0, "tile_width", "tile_height", "encoder_tile_size", "decoder_tile_size", "hypertile")
        if self.cfg_scale is not None:
            between(self, 0, 1e3, "cfg_scale")
        between(self, 0, 1, "strength")
        between(self, 0, 1, "grow_strength")
        between(self, 0, NOISE_LEVELS, "grow_steps")
        self._check_growing()
        check_seed(self.seed)
        if self.format == "webp" and max(self.width, self.height) > LARGEST_WEBP:
            raise BadInput(
                f"format=webp ends at {LARGEST_WEBP} px a side; take png or jpg for {self.width}x{self.height}"
            )
        check_format(self.name_format, "nhbi")
        check_text(self, "prompt", "negative_prompt")
        check_constructs(self, "prompt", "negative_prompt")
        for needy, needed in (
            ("mask", "init_image"),
            ("control_image", "controlnet"),
            ("controlnet", "control_image"),
        ):
            if getattr(self, needy) and not getattr(self, needed):
                raise BadInput(f"{needy}={getattr(self, needy)!r} needs --{needed} too")
        if self.init_image and self.steps and not int(self.steps * self.strength):
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
        if self.keep_attention == "auto":
            check_measuring(self.offload)
        if self.lora and {"qkv", "int8"} & set(self.optimizations):
            raise BadInput("optimize=qkv and int8 replace the weights that a LoRA changes; leave them out, or the LoRA")
        if "bf16" in self.optimizations and self.dtype not in ("auto", "bfloat16"):
            raise BadInput(f"optimize=bf16 and dtype={self.dtype} contradict each other; leave one away")

    def _check_growing(self) -> None:
        """What does not go together with a picture that grows. Raises BadInput."""
        if self.grow != "off":
            object.__setattr__(self, "grow_options", grow_options.written(self.grow, self.grow_options))
        if self.hires:
            between(self, 1, 16, "hires", open_low=True)
            if self.grow not in ("auto", "off", "redraw"):
                raise BadInput(f"hires={self.hires:g} is grow=redraw, not grow={self.grow}; leave one away")
            limit = ABSURD_SIDE if self.allow_huge else LARGEST_SIDE
            if self.width and max(self.width, self.height) * self.hires > limit:
                raise BadInput(
                    f"hires={self.hires:g} x {self.width}x{self.height} is larger than {limit} pixels a side"
                )
        if self.grow in ("deep_shrink", "hidiffusion") and "graphs" in self.optimizations:
            raise BadInput(
                f"grow={self.grow} changes the UNet from step to step, optimize=graphs does not see it; leave one"
            )
        growing = self.grow not in ("auto", "off") or (self.hires and self.grow != "off")
        if self.mask and growing:
            raise BadInput(f"mask={self.mask!r} keeps what is not white, growing draws all of it again; use --grow off")
        redrawn = growing and self.grow in ("auto", "redraw", "diffusehigh")
        if self.noise_inversion and not (self.init_image or redrawn):
            raise BadInput(f"noise_inversion={self.noise_inversion} needs --init_image too, or --grow redraw")

    @staticmethod
    def epilog() -> str:
        """The end of `--help_all`."""
        return grow_options.listing()

    def filled(self) -> GenerateConfig:
        """With what was left to the model, or to the picture to start from, as numbers. Raises BadInput.

        The prompt alone may stay None: the first of the model's example prompts.
        """
        values: dict[str, Any] = {}
        own = own_defaults(self.model)
        if not (self.width and self.height):
            values |= zip(("width", "height"), self._size((own.width, own.height)), strict=True)
            values["scale"] = 0.0
        if not self.steps:
            values["steps"] = own.steps
        for name in ("cfg_scale", "prompt"):
            if getattr(self, name) is None:
                values[name] = getattr(own, name)
        if self.prompt is None and self.init_image:
            raise BadInput(f"init_image={self.init_image!r} has no prompt beside it; say with -p what is to be drawn")
        return replace(self, **values) if values else self

    def _size(self, own: tuple[int, int]) -> tuple[int, int]:
        try:
            start = picture_size(self.init_image) if self.init_image else None
        except BadInput as error:
            raise BadInput(f"init_image: {error}") from None
        if self.scale and start is None:
            raise BadInput(f"scale={self.scale:g} is of a picture; give it with --init_image or --from, or -W and -H")
        return scaled(start, self.scale) if self.scale else canvas(self.width, self.height, own, start)

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


def check_measuring(offload: str) -> None:
    """Raises BadInput for what is to be measured while weights come and go."""
    if offload != "off":
        raise BadInput("keep_attention=auto measures where the weights stay; with --offload name the sites instead")
