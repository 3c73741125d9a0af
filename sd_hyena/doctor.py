"""python -m sd_hyena.doctor: what is installed, what this machine has, what the model is, what to expect at which size.

To be pasted into an issue. Exits with 1 if something that is needed does not work.
"""

from __future__ import annotations

import math
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options.command import run
from sd_hyena.options.command_line import option
from sd_hyena.options.given_path import class_name
from sd_hyena.options.train_config import TrainConfig

PACKAGES = ("torch", "diffusers", "transformers", "lightning", "tensorboard", "einops", "safetensors", "jsonargparse")
SIZES = (512, 1024, 2048, 4096)  # pixels a side
KINDS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # by the width of the text they read
LEAST_FREE = 2.0  # GiB on disk: a run keeps a few checkpoints


class Unwell(RuntimeError):
    """Something that is needed does not work."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look at the installation, the machine and a model."""

    model: str = option("", "diffusers folder, .safetensors or .ckpt file; default: the small one that ships", "-m")
    out_dir: str = option("out", "where training would write", "-o")
    device: str = option("auto", "auto, cpu, cuda, mps")
    debug: bool = option(False, "show the traceback of an error")


def main(config: DoctorConfig) -> None:
    """Print what each part finds; a part that fails does not keep the others from looking. Raises Unwell."""
    parts: dict[str, Callable[[DoctorConfig], Iterator[str]]] = {
        "installed": _installed,
        "device": _device,
        "disk": _disk,
        "model": _model,
        "one UNet step": _expectations,
    }
    failed = []
    for name, look in parts.items():
        try:
            for line in look(config):
                print(f"{name:<14} {line}", flush=True)
        except (BadInput, OSError, ImportError) as error:
            failed.append(name)
            print(f"{name:<14} FAILS: {' '.join(str(error).split())[:300]}")
    if failed:
        raise Unwell(f"not in order: {', '.join(failed)}")
    print("all in order")


def _installed(_config: DoctorConfig) -> Iterator[str]:
    yield f"python {platform.python_version()} on {platform.platform()}"
    try:
        yield ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    except PackageNotFoundError as error:
        raise ImportError(f"{error}; run pip install {error.name}") from None


def _device(config: DoctorConfig) -> Iterator[str]:
    import torch

    from sd_hyena.processes.device import pick_device
    from sd_hyena.processes.memory import available_gib

    device = pick_device(config.device)
    if device.type == "cuda":
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
        half = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        yield f"{torch.cuda.get_device_name(device)}, {free:.1f} of {total:.1f} GiB free, {half}, CUDA {torch.version.cuda}"
    else:
        yield f"{device.type}, {torch.get_num_threads()} threads of {platform.processor() or platform.machine()}, float32"
    if not math.isnan(free := available_gib()):
        yield f"{free:.1f} GiB of the computer's memory are free"


def _disk(config: DoctorConfig) -> Iterator[str]:
    from sd_hyena.files.names import own_folder

    with own_folder(config.out_dir) as folder:
        free = shutil.disk_usage(folder).free / 2**30
    if free < LEAST_FREE:
        raise OSError(f"{folder} has {free:.1f} GiB free; a run needs {LEAST_FREE:g}")
    yield f"{folder} is writable, {free:.1f} GiB free"


def _model(config: DoctorConfig) -> Iterator[str]:
    from sd_hyena.models.location import model_sha256
    from sd_hyena.sites import find_sites

    path, kind, unet = _looked_at(config.model)
    yield f"{path}, {kind}, hash {model_sha256(path)[:10]}"
    sites = find_sites(unet)
    for level in sorted({site.level for site in sites}):
        found = [site for site in sites if site.level == level]
        yield f"level{level}, {found[0].channels} channels: {' '.join(site.short for site in found)}"


def _expectations(config: DoctorConfig) -> Iterator[str]:
    """Counted operations, and the time they take at the rate of this machine's matrix products: a lower bound."""
    from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops
    from sd_hyena.processes.device import pick_device
    from sd_hyena.sites import find_sites
    from sd_hyena.students.student import spec_for

    unet, train, rate = _looked_at(config.model)[-1], TrainConfig(), _rate(pick_device(config.device))
    sites = find_sites(unet)
    finest = [site for site in sites if site.level == min(site.level for site in sites)]
    yield f"{rate / 1e9:.0f} GFLOP/s in matrix products; one sample, no guidance"
    for side in SIZES:
        cells, saved = (side // 8, side // 8), 0
        for site in finest:
            spec, size = spec_for(site, train.operator, train.options_of_operator(), cells), site.size(*cells)
            saved += attention_flops(site, size) - folded_flops(spec, size)
        whole = unet_flops(unet, cells)
        yield (
            f"{side} px: {whole / rate:.3g} s with attention, {(whole - saved) / rate:.3g} s with students at "
            f"level{finest[0].level} ({whole / (whole - saved):.1f} times cheaper)"
        )


@cache
def _looked_at(model: str) -> tuple[Path, str, Any]:
    """A model's path, once its files are checked, its kind, and its UNet without weights. Raises BadInput."""
    import torch
    from diffusers import UNet2DConditionModel

    from sd_hyena.models.inpainting import is_inpainting
    from sd_hyena.models.location import model_path
    from sd_hyena.models.single_file import configuration_of

    path = model_path(model)
    folder = configuration_of(path) if path.is_file() else path
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    width = unet.config.cross_attention_dim
    kind = KINDS.get(width, f"{class_name(folder / 'model_index.json')} that reads text of width {width}")
    return path, kind + (", inpainting" if is_inpainting(unet) else ""), unet


def _rate(device: Any) -> float:
    """Operations a second of a matrix product in the precision that would be used."""
    import torch

    from sd_hyena.cost.timing import wait_for
    from sd_hyena.processes.device import pick_dtype

    n = 4096 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=pick_dtype("auto", device))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        wait_for(device)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def command(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run(DoctorConfig, main, arguments)


if __name__ == "__main__":
    sys.exit(command())
