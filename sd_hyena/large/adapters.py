"""Which of a network's LoRAs act: those that PEFT keeps in its layers, and those that are kept by `Adapters`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced


@dataclass
class ChangedWeight:
    """A weight to which LoRAs add what they compute from it; `was` is the weight itself, `changes` are by name."""

    weight: nn.Parameter
    was: Tensor
    changes: list[tuple[str, Callable[[Tensor], Tensor]]] = field(default_factory=list)

    def __post_init__(self):
        self._known: dict[frozenset[str], Tensor] = {}

    def changed_by(self, names: Collection[str]) -> Tensor:
        """The weight with the changes of these LoRAs, in its own dtype, where it is now; a tensor of its own."""
        before = self.was.to(self.weight.device)
        after = before.float()
        for name, change in self.changes:
            if name in names:
                after = after + change(before.float())
        return after.to(before.dtype, copy=True)

    def fill(self, names: Collection[str]) -> None:
        """Let the changes of these LoRAs, and no others, be in the weight. It stays where it is in memory. Raises BadInput."""
        if self.weight.is_meta:
            raise BadInput(
                "a region's LoRA that is merged into weights needs them in memory; use --offload off or model"
            )
        key = frozenset(name for name, _ in self.changes if name in names)
        if key not in self._known:
            self._known[key] = self.changed_by(key)
        self.weight.data.copy_(self._known[key])


@dataclass
class Adapters:
    """The LoRAs of one network, which finds them under its attribute `loras`. All of them act, if no others are told."""

    names: tuple[str, ...]
    weights: list[ChangedWeight] = field(default_factory=list)

    def __post_init__(self):
        self.acting: Collection[str] = self.names

    @contextmanager
    def only(self, names: Collection[str]) -> Iterator[None]:
        """Within the block, these act."""
        before, self.acting = self.acting, frozenset(name for name in self.names if _plain(name) in names)
        changing = [one for one in self.weights if _acting(one, before) != _acting(one, self.acting)]
        try:
            for one in changing:
                one.fill(self.acting)
            yield
        finally:
            self.acting = before
            for one in changing:
                one.fill(before)


def _acting(weight: ChangedWeight, names: Collection[str]) -> set[str]:
    return {name for name, _ in weight.changes if name in names}


def _plain(name: str) -> str:
    """A name as PEFT allows it, whose names have no dots."""
    return name.replace(".", "_")


def loaded(networks: Sequence[nn.Module]) -> list[str]:
    """The names of all LoRAs in these networks."""
    found = [name for network in networks for name in getattr(network, "peft_config", {})]
    found += [name for network in networks if (ours := _ours(network)) for name in ours.names]
    return list(dict.fromkeys(found))


def is_loaded(networks: Sequence[nn.Module], name: str) -> bool:
    return _plain(name) in map(_plain, loaded(networks))


@contextmanager
def acting(networks: Sequence[nn.Module], names: Sequence[str] | None) -> Iterator[None]:
    """Within the block, only these LoRAs act, with the strengths they have; None leaves those that do."""
    with ExitStack() as stack:
        for network in networks if names is not None else ():
            for layer in _layers_of_peft(network):
                stack.enter_context(replaced(layer, "_active_adapter", list(names)))
                stack.enter_context(replaced(layer, "_disable_adapters", False))
            if ours := _ours(network):
                stack.enter_context(ours.only({_plain(name) for name in names}))
        yield


def _ours(network: nn.Module) -> Adapters | None:
    return vars(network).get("loras")


def _layers_of_peft(network: nn.Module) -> list[nn.Module]:
    if not hasattr(network, "peft_config"):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
