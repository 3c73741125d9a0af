"""LoRA files applied to a pipeline: beside the weights where they are of low rank, in the weights where they are not.

Each change is computed from the model's own weights, and changes are added up, so their order does not matter. One of low
rank is two small layers beside its module; any other is added to the weight. Afterwards the weights are those that were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.adapters import Adapters, ChangedWeight
from sd_hyena.large.around import replaced
from sd_hyena.models.lora.families import bias_change, low_rank, scale_of, shape_of, weight_change
from sd_hyena.models.lora.lora_file import READ, Change, LoraFile
from sd_hyena.models.lora.module_index import modules_of, networks_of


class Given(NamedTuple):
    """A file and how strongly it acts on the UNet; on the text encoders as strongly, if nothing else is said."""

    lora: LoraFile
    strength: float = 1.0
    text_strength: float | None = None

    def on(self, network: str) -> float:
        return self.strength if network == "unet" or self.text_strength is None else self.text_strength


class Applied(NamedTuple):
    """The names by which regions call the files, in order, and what is to be said of each: a line, or none."""

    names: tuple[str, ...]
    notes: tuple[str, ...]


class Bound(NamedTuple):
    """A change and the module of a pipeline's network that it is for."""

    change: Change
    network: str
    module: nn.Module


@contextmanager
def loras_in(pipe: Any, given: Sequence[Given]) -> Iterator[Applied]:
    """Within the block, `pipe` draws with these files; afterwards, also after an exception, it is as it was, bit for bit.

    Apply them where the weights are in memory (before offloading), and take them back there. Raises BadInput, before
    anything is changed, for a file of another model, and one that changes nothing.
    """
    if not given:
        yield Applied((), ())
        return
    networks = networks_of(pipe)
    index = {name: modules_of(network) for name, network in networks.items()}
    names, bound, notes = _names(given), [], []
    for one in given:
        found, missing = _bound(one.lora, index)
        bound.append(found)
        notes += _notes(one.lora, len(found), missing)
    with ExitStack() as stack:
        for network, owner in networks.items():
            adapters = Adapters(tuple(names))
            stack.enter_context(replaced(owner, "loras", adapters))
            weights: dict[int, ChangedWeight] = {}
            for name, one, changes in zip(names, given, bound, strict=True):
                for change, _, module in (b for b in changes if b.network == network and one.on(network)):
                    if change.is_low_rank and _takes_layers(module):
                        beside = LowRank(name, adapters, change, module, one.on(network))
                        stack.callback(module.register_forward_hook(beside).remove)
                    else:
                        _merge(weights, name, change, module, one.on(network))
            for changed in weights.values():
                stack.callback(_restore, changed)
                changed.weight.data = _finite(changed.changed_by(names))
            adapters.weights = list(weights.values())
        yield Applied(tuple(names), tuple(notes))


def _names(given: Sequence[Given]) -> list[str]:
    names: list[str] = []
    for i, one in enumerate(given):
        names.append(f"{one.lora.name}_{i}" if one.lora.name in names else one.lora.name)
    return names


def _bound(lora: LoraFile, index: dict[str, dict[str, tuple[str, nn.Module]]]) -> tuple[list[Bound], list[str]]:
    """The changes with their modules, and the names of modules that the pipeline does not have. Raises BadInput."""
    found: list[Bound] = []
    missing, taken = [], set()
    for change in lora.changes:
        places = [(network, *index[network][change.path]) for network in _networks(change, index)]
        if not places:
            missing.append(change.module)
            continue
        misfits = [_misfit(change, module) for _, _, module in places]
        if all(misfits):
            raise BadInput(
                f"lora={str(lora.path)!r} does not fit this model: {change.module} {misfits[0]}{_made_for(lora)}"
            )
        network, path, module = places[misfits.index("")]  # of SDXL's two text encoders the one that it fits
        if module in taken:
            raise BadInput(f"lora={str(lora.path)!r} says twice what {path} gets, the second time as {change.module}")
        taken.add(module)
        found.append(Bound(change, network, module))
    if not found and (lora.changes or not lora.embeddings):
        raise BadInput(
            f"lora={str(lora.path)!r} changes nothing: this model has none of its {len(missing)} modules, the first "
            f"of them {missing[0]}{_made_for(lora)}"
        )
    if found and not any(_does_something(bound) for bound in found):
        raise BadInput(f"lora={str(lora.path)!r} changes nothing: its numbers are zero; get the file again")
    return found, missing


def _networks(change: Change, index: dict[str, dict[str, Any]]) -> list[str]:
    """Those that have the module, of the network that is named, or of all."""
    return [name for name in index if change.network in (None, name) and change.path in index[name]]


def _made_for(lora: LoraFile) -> str:
    return f"; it was made for {lora.model}" if lora.model else "; give one that was made for it"


def _misfit(change: Change, module: nn.Module) -> str:
    """Why a change cannot be added to a module; empty if it can."""
    tensors, weight = change.tensors, module.weight
    shape = shape_of(change.family, tensors, weight)
    if shape is None or shape[:1] != weight.shape[:1] or math.prod(shape) != weight.numel():
        return f"is of {_listed(shape or _shapes(change))}, the model's of {_listed(weight.shape)}"
    if "dora_scale" in tensors and (weight.ndim < 2 or tensors["dora_scale"].numel() not in weight.shape[:2]):
        return f"has {tensors['dora_scale'].numel()} lengths for a weight of {_listed(weight.shape)}"
    bias, given = getattr(module, "bias", None), _of_bias(change)
    if given is not None and (bias is None or bias.numel() != given.numel()):
        return f"has a bias of {given.numel()}, the model's {'none' if bias is None else bias.numel()}"
    return ""


def _shapes(change: Change) -> tuple[int, ...]:
    return tuple(next(iter(change.tensors.values())).shape)


def _listed(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"


def _of_bias(change: Change) -> Tensor | None:
    return next((change.tensors[part] for part in ("diff_b", "b_norm") if part in change.tensors), None)


def _does_something(bound: Bound) -> bool:
    change, tensors = bound.change, bound.change.in_float32()
    if change.is_low_rank:
        return all(bool(factor.any()) for factor in low_rank(tensors))
    bias = _of_bias(change)
    weight = bound.module.weight.detach().cpu().float()
    return bool(weight_change(change.family, tensors, weight).any()) or (bias is not None and bool(bias.float().any()))


def _notes(lora: LoraFile, changed: int, missing: Sequence[str]) -> Iterator[str]:
    if missing:
        yield (
            f"note: lora={str(lora.path)!r} changes {changed} of its {changed + len(missing)} modules; this model has no "
            f"{missing[0]}{_more(missing)}"
        )
    if lora.strangers:
        yield f"note: lora={str(lora.path)!r}: {lora.strangers[0]}{_more(lora.strangers)} is left out; {READ}"


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _takes_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


class LowRank:
    """A hook on a linear layer or convolution: adds what a LoRA's two factors make of the same input."""

    def __init__(self, name: str, adapters: Adapters, change: Change, module: nn.Module, strength: float):
        tensors = change.in_float32()
        down, up = low_rank(tensors)
        down = down.reshape(len(down), *module.weight.shape[1:])
        up = up.reshape(len(up), -1, *[1] * (down.ndim - 2))
        self.name, self.adapters = name, adapters
        self.scale = strength * scale_of(change.family, tensors)
        self.factors = tuple(_finite(factor.to(module.weight)) for factor in (down, up))
        _finite((self.scale * up).to(module.weight))
        self.copies = self.factors  # as the last input needed them

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.name not in self.adapters.acting:
            return None
        x = arguments[0]
        if (x.dtype, x.device) != (self.copies[0].dtype, self.copies[0].device):
            self.copies = tuple(factor.to(x) for factor in self.factors)
        down, up = self.copies
        if isinstance(module, nn.Linear):
            return _sum(output, F.linear(F.linear(x, down), up), self.scale)
        return _sum(output, F.conv2d(module._conv_forward(x, down, None), up), self.scale)


def _sum(output: Tensor, change: Tensor, scale: float) -> Tensor:
    return torch.add(output, change.to(output.dtype), alpha=scale)


def _merge(weights: dict[int, ChangedWeight], name: str, change: Change, module: nn.Module, strength: float) -> None:
    """Note that a module's weight, and bias, take a change."""

    def add(weight: nn.Parameter, difference: Callable[[Tensor], Tensor]) -> None:
        if id(weight) not in weights:
            was = weight.data.cpu() if weight.is_cuda else weight.data  # a GPU holds it once
            weights[id(weight)] = ChangedWeight(weight, was)
        weights[id(weight)].changes.append((name, difference))

    def on(device: torch.device) -> dict[str, Tensor]:
        return {part: tensor.to(device) for part, tensor in change.in_float32().items()}

    add(module.weight, lambda weight: strength * weight_change(change.family, on(weight.device), weight))
    bias = getattr(module, "bias", None)
    if bias is not None and bias_change(change.in_float32(), module.weight, bias.detach()) is not None:
        add(bias, lambda bias: strength * bias_change(on(bias.device), module.weight, bias))


def _restore(changed: ChangedWeight) -> None:
    if not changed.weight.is_meta:  # offloaded, and never fetched again
        changed.weight.data = changed.was.to(changed.weight.device)


def _finite(tensor: Tensor) -> Tensor:
    if not tensor.isfinite().all():
        raise BadInput(
            f"lora: its changes are too large for {str(tensor.dtype).removeprefix('torch.')}; "
            "give it a smaller weight, or use --dtype float32"
        )
    return tensor
