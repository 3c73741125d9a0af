"""The straight line from a GenerateConfig to image files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sd_hyena.arrangement import arranged, tile_of, told
from sd_hyena.checkpoint import load_students
from sd_hyena.config import GenerateConfig, drawn_seed, to_dict
from sd_hyena.errors import BadInput
from sd_hyena.file_names import writable_folder
from sd_hyena.image_file import parameters, write_image
from sd_hyena.pipeline import (
    load_pipeline,
    model_path,
    model_sha256,
    pick_device,
    pick_dtype,
    prompts_of,
    set_scheduler,
)
from sd_hyena.regions import read_regions
from sd_hyena.regions import to_dict as regions_to_dict
from sd_hyena.sites import find_sites
from sd_hyena.student import cast
from sd_hyena.swap import swapped
from sd_hyena.task import check_files, prepare

KERNELS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}


@dataclasses.dataclass(frozen=True)
class Alternative:
    """One entry of `-y a,b`: the students that are swapped in together, and how to name them."""

    students: dict[str, nn.Module]
    entry: str = ""
    label: str = ""
    teacher_sha256: tuple[str, ...] = ()


def generate(config: GenerateConfig) -> list[Path]:
    """Write all images and return their paths. Raises BadInput before anything is generated."""
    path = model_path(config.model)
    folder = writable_folder(config.out_dir)
    check_files(config)
    if arrangement := told(config):
        print(arrangement)
    device = pick_device(config.device)
    prompt = prompts_of(path)[0] if config.prompt is None else config.prompt
    config = dataclasses.replace(config, seed=drawn_seed(config.seed), prompt=prompt)
    pipe = load_pipeline(path, device, pick_dtype(config.dtype, device))
    set_scheduler(pipe, config.scheduler, config.karras)
    alternatives = load_alternatives(config.hyena, pipe.unet, config.target) or [Alternative({})]
    sha256 = model_sha256(path)
    for alternative in alternatives:
        if any(hash_ and hash_ != sha256 for hash_ in alternative.teacher_sha256):
            print(
                f"note: {alternative.label} was trained on another model; its change is added to this one's projections"
            )
        _check_sizes(alternative, pipe.unet, config)
    _warn_of_long_prompt(pipe, prompt)
    pipe, given = prepare(pipe, config)
    written = []
    with _attention_backend(config.attention_backend), arranged(pipe, config):
        for h, alternative in enumerate(alternatives):
            written += _write_alternative(pipe, config, given, h, alternative, folder, path.name, sha256)
    return written


def load_alternatives(files: str, unet: nn.Module, target: str = "IN01") -> list[Alternative]:
    """The alternatives of `a,b+c`, where `+` uses several files at once. Raises BadInput."""
    result = []
    for entry in filter(None, (part.strip() for part in files.split(","))):
        together, labels, hashes = {}, [], []
        for name in filter(None, (part.strip() for part in entry.split("+"))):
            file = load_students(name, unet, target)
            for site, student in file.students.items():
                if site in together:
                    raise BadInput(
                        f"hyena={entry!r} gives {student.spec.short} twice; separate alternatives with a comma"
                    )
                together[site] = cast(student, next(unet.parameters())).eval()
                labels.append(f"{student.spec.short}:{Path(name).stem}")
            hashes.append(file.training.get("teacher_sha256", ""))
        result.append(Alternative(together, entry, ", ".join(labels), tuple(hashes)))
    return result


def _check_sizes(alternative: Alternative, unet: nn.Module, config: GenerateConfig) -> None:
    sites = {site.name: site for site in find_sites(unet)}
    for name, student in alternative.students.items():
        if not student.spec.serves(sites[name].size(*tile_of(config))):
            h, w = (cells * 8 * 2 ** sites[name].level for cells in student.spec.size)
            raise BadInput(
                f"{student.spec.short} was trained at {w}x{h} and its 1-D filter serves that size only, not "
                "{1}x{0}".format(*(8 * cells for cells in tile_of(config)))
                + f"; generate with -W {w} -H {h} or in tiles of {w // 8}x{h // 8}, or train at this size"
            )


def _write_alternative(
    pipe: Any,
    config: GenerateConfig,
    given: dict[str, Any],
    h: int,
    alternative: Alternative,
    folder: Path,
    model: str,
    sha256: str,
) -> list[Path]:
    written, total = [], config.num_images * config.iteration
    steps = int(config.steps * config.strength) if config.init_image else config.steps
    bar = tqdm(total=total * steps, unit="step", disable=None, desc=alternative.label or model)
    for rows in _batches(total, config.batch_size):
        with swapped(pipe.unet, alternative.students):
            images = draw(pipe, config, given, rows, bar)
        compared = (
            draw(pipe, config, given, rows, None) if config.compare and alternative.students else [None] * len(rows)
        )
        for n, image, teacher in zip(rows, images, compared, strict=True):
            one = dataclasses.replace(
                config, hyena=alternative.entry, seed=(config.seed + n) % 2**32, num_images=1, iteration=1
            )
            name = config.name_format.format(h=h, n=n, b=n // config.num_images, i=n % config.num_images)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            text = parameters(to_dict(one), model, sha256, alternative.label)
            metadata = {"config": to_dict(one), "model_sha256": sha256, "students": alternative.label}
            if config.regions:
                metadata["regions"] = regions_to_dict(read_regions(config.regions))
            written.append(path := write_image(folder / f"{name}.png", Image.fromarray(image), text, metadata))
            if teacher is not None:
                picture, (psnr, ssim) = side_by_side(teacher, image), similarity(teacher, image)
                path = path.with_name(f"{path.stem}-compare.png")
                path = write_image(path, Image.fromarray(picture), text, metadata | {"psnr": psnr, "ssim": ssim})
                written.append(path)
                tqdm.write(f"{path}: teacher | student | difference, PSNR {psnr:.1f} dB, SSIM {ssim:.3f}")
    bar.close()
    return written


def _batches(total: int, size: int) -> Iterator[range]:
    for start in range(0, total, size):
        yield range(start, min(start + size, total))


def draw(pipe: Any, config: GenerateConfig, given: dict[str, Any], rows: range, bar: Any) -> list[np.ndarray]:
    """Images number `rows` as uint8 (H, W, 3); image n comes from seed + n alone. NaN is decoded again in float32.

    `given` is what the pipeline's call needs for its task.
    """

    def advance(_pipe, _step, _timestep, tensors):
        if bar is not None:
            bar.update(len(rows))
        return tensors

    latents = pipe(
        config.prompt,
        negative_prompt=config.negative_prompt,
        **given,
        num_images_per_prompt=len(rows),
        num_inference_steps=config.steps,
        guidance_scale=config.cfg_scale,
        generator=[torch.Generator().manual_seed((config.seed + n) % 2**32) for n in rows],
        output_type="latent",
        callback_on_step_end=advance,
    ).images
    return [decoded(pipe, x[None]) for x in latents]


@torch.no_grad()
def decoded(pipe: Any, latents: Tensor) -> np.ndarray:
    """Latents (1, 4, h, w) as an image, uint8 (H, W, 3). Raises FloatingPointError if they are not finite."""
    if not latents.isfinite().all():
        raise FloatingPointError("the latents are not finite; try --dtype float32 or bfloat16")
    latents = latents / pipe.vae.config.scaling_factor
    image = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    if not image.isfinite().all():
        dtype = pipe.vae.dtype
        image = pipe.vae.float().decode(latents.float()).sample
        pipe.vae.to(dtype)
        if not image.isfinite().all():
            raise FloatingPointError("the VAE gives NaN even in float32; this VAE is damaged")
    pixels = ((image[0].float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return pixels.permute(1, 2, 0).cpu().numpy()


def side_by_side(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """teacher | student | absolute difference."""
    difference = np.abs(teacher.astype(np.int16) - student).astype(np.uint8)
    return np.concatenate([teacher, student, difference], axis=1)


def similarity(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (100 for equal images) and SSIM of two uint8 images."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    mse = np.square(a.astype(np.float64) - b).mean()
    psnr = 100.0 if mse == 0 else float(10 * np.log10(255**2 / mse))
    x, y = (torch.from_numpy(image).permute(2, 0, 1)[None].float() for image in (a, b))
    return psnr, float(ssim(x, y, data_range=255.0))


@contextmanager
def _attention_backend(name: str) -> Iterator[None]:
    if name == "auto":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, KERNELS[name])):
        yield


def _warn_of_long_prompt(pipe: Any, prompt: str) -> None:
    limit = pipe.tokenizer.model_max_length
    count = len(pipe.tokenizer(prompt).input_ids)
    if count > limit:
        print(f"note: the prompt has {count - 2} tokens, the model reads the first {limit - 2}")
