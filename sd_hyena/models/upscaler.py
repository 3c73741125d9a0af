"""Upscaler models: ESRGAN, Real-ESRGAN, SwinIR, DAT and whatever else spandrel knows.

Files are read here as all files of weights are, without executing anything. spandrel is given tensors, never a path: its own
way to read a `.pt` runs what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.container import is_safetensors
from sd_hyena.files.safetensors_header import tensor_names
from sd_hyena.files.weights import read_checkpoint
from sd_hyena.files.weights_kind import NOTHING_KNOWN, UPSCALER, VAE, kind_of
from sd_hyena.models.budget import Budget
from sd_hyena.models.part import check_numbers

WITHIN = ("model_state_dict", "state_dict", "params_ema", "params-ema", "params", "model", "net", "tensors")
SLACK = 1 << 24  # numbers that building a network takes beside a few times those of its file
TRIED = 16  # px a side of the picture that a network is tried on
LARGEST_SCALE = 16
NO_SPANDREL = 'it takes spandrel to read it, which is not installed; run pip install "sd_hyena[upscale]"'
KNOWN = "known are ESRGAN, Real-ESRGAN, SwinIR, DAT, HAT and what else spandrel reads"
PURPOSES = {
    "Restoration": "cleans pictures and does not enlarge them",
    "FaceSR": "restores faces and does not enlarge pictures",
    "Inpainting": "fills holes and does not enlarge pictures",
}


@dataclass(frozen=True)
class Upscaler:
    """A network that makes pictures `scale` times as large; its sides are best multiples of `multiple` pixels.

    It waits in the computer's memory and works on `device` in `dtype`.
    """

    path: Path
    network: Any  # spandrel's descriptor
    scale: int
    multiple: int
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.path.stem

    @contextmanager
    def at_work(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Within the block the network is on its device. (1, 3, H, W) -> (1, 3, scale·H, scale·W), float32 on the CPU in 0 ... 1.

        What is not finite in half precision is computed again, and from then on, in float32. Raises FloatingPointError if
        it is not finite there either.
        """
        try:
            self.network.to(self.device, self.dtype)
            yield self._larger
        finally:
            self.network.to(torch.device("cpu"))

    def _larger(self, x: Tensor) -> Tensor:
        answer = self._answer(x)
        if not answer.isfinite().all() and self.network.dtype != torch.float32:
            self.network.to(torch.float32)
            answer = self._answer(x)
        if not answer.isfinite().all():
            raise FloatingPointError(f"the upscaler {self.name} gives NaN; give another")
        return answer.float().cpu()

    @torch.no_grad()
    def _answer(self, x: Tensor) -> Tensor:
        """Some draw noise: always the same, and nobody else's is touched."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.network(x.to(self.network.device, self.network.dtype))


def load_upscaler(given: str | Path, device: torch.device, dtype: torch.dtype) -> Upscaler:
    """The network of a file, tried once; in half precision only if it is known to work in it. Raises BadInput."""
    path = Path(given)
    try:
        network = _network(_tensors(path))
        _try(network)
    except BadInput as error:
        raise BadInput(f"upscaler={str(given)!r}: {error}") from None
    half = {torch.float16: network.supports_half, torch.bfloat16: network.supports_bfloat16}
    multiple = network.size_requirements.multiple_of
    return Upscaler(path, network, network.scale, multiple, device, dtype if half.get(dtype) else torch.float32)


def _tensors(path: Path) -> dict[str, Tensor]:
    """What is stored, in float32 where it is floating point. Raises BadInput."""
    if not path.is_file():
        raise BadInput("it is no file")
    if is_safetensors(path):
        _check_kind(tensor_names(path))  # before gigabytes of something else are read
    tensors = read_checkpoint(path, WITHIN)
    _check_kind(tensors)
    stored = sum(value.numel() for value in tensors.values())
    if not stored:
        raise BadInput(f"it holds no weights by names that are looked for; {KNOWN}")
    numbers = [int(part) for name in tensors for part in re.findall(r"(?:^|(?<=\.))[0-9]{1,18}(?=\.|$)", name)]
    if max(numbers, default=0) > 2 * len(tensors) + 64 or any(re.search(r"[0-9]{19}", name) for name in tensors):
        raise BadInput("it is no honest file: a name counts layers that are not there")
    for name, value in tensors.items():
        if max(value.shape, default=0) > stored:
            raise BadInput(f"it is no honest file: {name} of {tuple(value.shape)} is larger than all that is stored")
        parameter = name.rpartition(".")[2] in ("weight", "bias")
        if value.is_quantized or value.is_complex() or (parameter and not value.is_floating_point()):
            raise BadInput(f"it is damaged, or compressed in a way that is not known: {name} is {value.dtype}")
    floats = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
    check_numbers("network", floats)
    return tensors | floats


def _check_kind(names: Iterable[str]) -> None:
    """Raise BadInput for files that are known to be something else."""
    if (kind := kind_of(names)) not in (UPSCALER, NOTHING_KNOWN, VAE):
        raise BadInput(f"it looks like {kind}")


def _network(tensors: Mapping[str, Tensor]) -> Any:
    """spandrel's descriptor of the network that has these weights. Raises BadInput."""
    spandrel = _spandrel()
    stored = sum(value.numel() for value in tensors.values())
    try:
        with torch.random.fork_rng([]), Budget(16 * stored + SLACK):
            network = spandrel.ModelLoader(torch.device("cpu")).load_from_state_dict(dict(tensors))
    except spandrel.UnsupportedModelError:
        kind = kind_of(tensors)
        looks = f"it looks like {kind}" if kind is VAE else "it is no upscaler model that is known here"
        raise BadInput(f"{looks}; {KNOWN}") from None
    except Exception as error:  # of shapes that do not go together architectures raise whatever they stumble over
        raise BadInput(f"no network can be built of it ({_line(error)})") from None
    name = network.architecture.name
    if network.purpose != "SR" or not 2 <= network.scale <= LARGEST_SCALE:
        does = PURPOSES.get(network.purpose, f"enlarges {network.scale} times")
        raise BadInput(f"it is a model that {does} ({name}); give one of super-resolution")
    if (channels := (network.input_channels, network.output_channels)) != (3, 3):
        raise BadInput(f"it takes {channels[0]} channels and gives {channels[1]} ({name}); give one for RGB")
    network.model.eval().requires_grad_(False)
    return network


def _spandrel() -> Any:
    try:
        import spandrel
    except Exception as error:  # a torchvision of another torch raises whatever it stumbles over
        if isinstance(error, ModuleNotFoundError) and error.name == "spandrel":
            raise BadInput(NO_SPANDREL) from None
        raise BadInput(
            f"spandrel, which reads it, does not load ({_line(error)}); it takes the torchvision that belongs to torch "
            f"{torch.__version__}: run pip install torchvision"
        ) from None
    return spandrel


def _try(network: Any) -> None:
    """Raise BadInput unless the network makes of a small picture a large one."""
    side = TRIED * network.scale
    try:
        with torch.random.fork_rng([]):
            answer = network(torch.full((1, 3, TRIED, TRIED), 0.5))
    except Exception as error:  # what fits by its shapes may still not compute
        raise BadInput(f"its network does not compute ({_line(error)})") from None
    if answer.shape != (1, 3, side, side):
        raise BadInput(f"its network answers a picture of {TRIED}x{TRIED} px by a tensor of {tuple(answer.shape)}")
    if not answer.isfinite().all():
        raise BadInput("its network answers a grey picture by NaN; it is damaged")


def _line(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:160]}".strip()
