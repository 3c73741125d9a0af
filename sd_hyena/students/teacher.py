"""The teacher: a frozen UNet as a source of activations. Never part of a LightningModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sd_hyena.sites import Site, on_size
from sd_hyena.students.student import Projections, Size
from sd_hyena.students.swap import swapped


@dataclass(frozen=True)
class Activation:
    """What a site sees and answers: `input` and `target` (B, L, D), its (H, W), the timesteps (B,), its projections."""

    input: Tensor
    target: Tensor
    size: Size
    timestep: Tensor
    projections: Projections


@dataclass(frozen=True)
class Observation:
    """What a whole forward showed, by site: its output (B, L, D), that of the block around it; and the prediction."""

    outputs: dict[str, Tensor]
    blocks: dict[str, Tensor]
    prediction: Tensor


# What the UNet is told besides latents and timestep: `encoder_hidden_states` (B, T, D), and what it names added_cond_kwargs.
Condition = Mapping[str, Tensor]


class _SeenEnough(Exception):
    """Ends a forward pass after the last selected site."""


class Teacher:
    """Answers for `sites` (in the UNet's order) of a frozen UNet. `whole=True` runs each forward to its end."""

    def __init__(self, unet: nn.Module, sites: list[Site], whole: bool = False):
        self.unet, self.sites, self.whole = unet.eval().requires_grad_(False), sites, whole

    def to(self, device: torch.device) -> Teacher:
        self.unet.to(device)
        return self

    @torch.no_grad()
    def activations(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> dict[str, Activation]:
        """The activations of all sites at noisy latents (B, 4, h, w), from one forward that stops at the last site."""
        seen: dict[str, Activation] = {}
        with self._watched(seen, timesteps), suppress(_SeenEnough):
            self._predict(latents, timesteps, condition)
        for name, activation in seen.items():
            if not activation.target.isfinite().all():
                raise FloatingPointError(
                    f"the teacher's own output at {name} is not finite in {self.unet.dtype}; use bfloat16 or float32"
                )
        return seen

    def observe(
        self, latents: Tensor, timesteps: Tensor, condition: Condition, students: Mapping[str, nn.Module] | None = None
    ) -> Observation:
        """A whole forward, with `students` swapped in if given; their parameters receive gradients unless disabled."""
        outputs: dict[str, Tensor] = {}
        blocks: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(swapped(self.unet, students or {}))
            for site in self.sites:
                for seen, path in ((outputs, site.name), (blocks, site.name.rpartition(".")[0])):
                    note = partial(_keep, seen, site.name)
                    stack.callback(self.unet.get_submodule(path).register_forward_hook(note).remove)
            prediction = self._predict(latents, timesteps, condition)
        return Observation(outputs, blocks, prediction)

    def _predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        p = next(self.unet.parameters())
        told = {name: value.to(p) for name, value in condition.items()}
        text = told.pop("encoder_hidden_states")
        return self.unet(latents.to(p), timesteps, text, added_cond_kwargs=told).sample

    @torch.no_grad()
    def answers(self, inputs: Mapping[str, Tensor], size: Size, timesteps: Tensor) -> dict[str, Activation]:
        """What each site's attention alone makes of given tokens (B, L, D): the ancestor's way of teaching."""
        result = {}
        for site in self.sites:
            attention = self.unet.get_submodule(site.name)
            x = inputs[site.name].to(next(attention.parameters()))
            result[site.name] = Activation(x, attention(x), site.size(*size), timesteps, Projections.of(attention))
        return result

    @contextmanager
    def _watched(self, seen: dict[str, Activation], timesteps: Tensor) -> Iterator[None]:
        sizes: dict[str, Size] = {}
        hooks = []
        try:
            for site in self.sites:
                attention = self.unet.get_submodule(site.name)
                hooks.append(on_size(self.unet, site.name, partial(sizes.__setitem__, site.name)))
                stop = site is self.sites[-1] and not self.whole
                hooks.append(
                    attention.register_forward_hook(_note(seen, sizes, site, timesteps, stop), with_kwargs=True)
                )
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _keep(seen: dict[str, Tensor], site: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
    seen[site] = output


def _note(seen: dict[str, Activation], sizes: dict[str, Size], site: Site, timesteps: Tensor, stop: bool) -> Callable:
    def hook(attention, args, kwargs, output):
        x = args[0] if args else kwargs["hidden_states"]
        seen[site.name] = Activation(x, output, sizes[site.name], timesteps, Projections.of(attention))
        if stop:
            raise _SeenEnough

    return hook
