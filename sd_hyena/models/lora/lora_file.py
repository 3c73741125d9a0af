"""A LoRA file, read and checked before any model is there: what it changes, under the names that it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import read_checkpoint
from sd_hyena.files.weights_kind import LORA, NOTHING_KNOWN, kind_of
from sd_hyena.models.lora.alphas import Alphas
from sd_hyena.models.lora.families import BESIDE, KNOWN, Family, family_of
from sd_hyena.models.lora.tensor_names import EMBEDDING, TensorName, read_name

READ = "LoRA, LoCon, LoHa, LoKr, DoRA, OFT, (IA)³, GLoRA and whole differences are read"
SINGLE = ("alpha", "scale", "on_input")  # parts that are one number
SDXL = ("clip_l", "clip_g")  # the halves of a bundled embedding, in the order of its text encoders
WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}  # of the text that a UNet reads
STRANGERS = (  # what a module's name says of its model
    ("single_transformer_blocks", "Flux"),
    ("double_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("transformer_transformer_blocks", "a model with a transformer instead of a UNet"),
)


@dataclass(frozen=True)
class Change:
    """What a file does to one module: called `module` in the file, `path` flat; `network` is None if it does not say."""

    module: str
    path: str
    network: str | None
    family: Family
    tensors: Mapping[str, Tensor]

    @property
    def is_low_rank(self) -> bool:
        return self.family.name == "LoRA" and not self.tensors.keys() & {"dora_scale", "diff_b"}

    def in_float32(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class LoraFile:
    """All of a file: changes; embeddings that are bundled with it, (n, D) for each text encoder, by their word; the names
    of tensors that are not understood."""

    path: Path
    changes: tuple[Change, ...]
    embeddings: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def model(self) -> str:
        """Which model the file was made for, as far as it says; else empty."""
        for change in self.changes:
            for mark, model in STRANGERS:
                if mark in change.path or mark in change.module.replace(".", "_"):
                    return model
        if any(change.network == "text_encoder_2" for change in self.changes):
            return "SDXL"
        reading = (
            c for c in self.changes if c.path.endswith(("attn2_to_k", "attn2_to_v")) and "lora_down" in c.tensors
        )
        return next((WIDTHS[width] for c in reading if (width := c.tensors["lora_down"].shape[-1]) in WIDTHS), "")


def read_lora(path: str | Path) -> LoraFile:
    """Raises BadInput for what is damaged, is no LoRA or of a family that is not known; whom it fits is told later."""
    path = Path(path)
    tensors = read_checkpoint(path)
    if not tensors:
        raise BadInput(f"lora={str(path)!r} holds no tensors; {LORA.use}")
    modules: dict[str, dict[str, Tensor]] = {}
    names: dict[str, TensorName] = {}
    bundled: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for name, tensor in tensors.items():
        _check_numbers(path, name, tensor)
        if match := EMBEDDING.match(name):
            bundled.setdefault(match["word"], {})[match["key"]] = tensor
        elif read := read_name(name):
            names[read.module] = read
            if read.part in modules.setdefault(read.module, {}):
                raise BadInput(f"lora={str(path)!r} says twice what {read.module} gets, the second time in {name}")
            single = read.part in SINGLE
            if tensor.numel() > 1 if single else tensor.ndim == 0:
                one = "one number" if single else "more than one number"
                raise BadInput(f"lora={str(path)!r}: {name} must be {one}; get the file again")
            modules[read.module][read.part] = tensor.flatten()[0] if single else tensor
        else:
            strangers.append(name)
    alphas = Alphas.beside(path)
    changes = []
    for module, parts in modules.items():
        if "magnitude" in parts:  # PEFT's, which is of the outputs whatever its shape
            parts["dora_scale"] = parts.pop("magnitude").flatten()
        family = family_of(set(parts))
        if family is None:
            if _half(parts):
                raise BadInput(
                    f"lora={str(path)!r} is not whole: {module} has {_half(parts)} alone; get the file again"
                )
            strangers += [f"{module}.{part}" for part in parts]
            continue
        if "alpha" not in parts and (scale := alphas.scale_of(module, family.rank(parts))) is not None:
            parts.setdefault("scale", torch.tensor(scale))
        known = {*family.needs, *family.may, *BESIDE}
        strangers += [f"{module}.{part}" for part in parts if part not in known]
        kept = {part: tensor for part, tensor in parts.items() if part in known}
        changes.append(Change(module, names[module].path, names[module].network, family, kept))
    embeddings = {word: _vectors(path, word, halves) for word, halves in bundled.items()}
    if not changes and not embeddings:
        kind = kind_of(tensors)
        looks = "like no LoRA that is known here" if kind in (LORA, NOTHING_KNOWN) else f"like {kind}"
        raise BadInput(f"lora={str(path)!r} looks {looks}: {next(iter(tensors))}; {READ}")
    return LoraFile(path, tuple(changes), embeddings, tuple(strangers))


def _half(parts: Mapping[str, Tensor]) -> str:
    """The part of a family that has lost the others; empty if there is none."""
    return next((part for part in parts if part in KNOWN - {"alpha", "scale", "weight"}), "")


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.is_complex() or not tensor.numel():
        raise BadInput(f"lora={str(path)!r}: {name} holds no real numbers; get the file again")
    if tensor.is_floating_point() and not tensor.float().isfinite().all():
        raise BadInput(f"lora={str(path)!r} is damaged: {name} holds NaN or infinities; get the file again")


def _vectors(path: Path, word: str, halves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """A bundled embedding's vectors (n, D) for each text encoder."""
    if halves.keys() == set(SDXL):
        found = [halves[key] for key in SDXL]
    elif len(halves) == 1:
        found = list(halves.values())
    else:
        raise BadInput(
            f"lora={str(path)!r} bundles an embedding {word!r} of {', '.join(halves)}; one entry is expected"
        )
    found = [torch.atleast_2d(one) for one in found]
    if any(one.ndim != 2 or not one.is_floating_point() for one in found):
        raise BadInput(f"lora={str(path)!r} bundles an embedding {word!r} that is no list of vectors")
    return tuple(one.float() for one in found)
