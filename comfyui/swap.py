"""Students in place of a ComfyUI model's self-attentions, by three of its public patches.

A block hands one and the same `extra_options` to all three: before its projections the tokens are noted there, in place of
the attention the student mixes, and after the block's own `to_out` comes the student's change to that. The model's weights
are not touched, so LoRAs, fp8 and low-VRAM loading work on them as always.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import engine
from .mixing import Finish, Mixing, Size
from .sites import Block

Options = dict[str, Any]


class Swap:
    """Mixings by block, used while the noise lies between two levels; elsewhere, and where they cannot work, attention.

    Called with a block's tokens, before its projections. All clones of a model share one of these.
    """

    def __init__(self, mixings: Mapping[Block, Mixing], sigmas: tuple[float, float] | None = None):
        self.mixings, self.sigmas = mixings, sigmas
        self.before: dict[Block, Any] = {}  # replacements of other nodes, which serve where ours do not
        self.warned: set[str] = set()

    def __deepcopy__(self, _memo: dict) -> Swap:
        return self

    def to(self, where: torch.device | torch.dtype) -> Swap:
        """ComfyUI tells a device and then the model's dtype; a student keeps its own dtype."""
        if not isinstance(where, torch.dtype):
            for mixing in self.mixings.values():
                _move(mixing.module, torch.device(where))
        return self

    def apply(self, model: Any) -> Any:
        """A clone of a ModelPatcher with this swap in it."""
        model = model.clone()
        others = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
        model.set_model_attn1_patch(self)
        for block in self.mixings:
            self.before[block] = others.get(block, others.get(block[:2]))
            model.set_model_attn1_replace(self.mix, *block)
        model.set_model_attn1_output_patch(self.finish)
        return model

    def __call__(self, x: Tensor, context: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor, Tensor]:
        if _block(options) in self.mixings:
            options[self, "tokens"] = x
        return x, context, value

    def mix(self, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
        """In place of the attention, (B, L, D) each."""
        block, x = _block(options), options.pop((self, "tokens"), None)
        mixing, size = self.mixings[block], _size(options, q.shape[1])
        if not self._now(options) or (reason := self._hindrance(mixing, q, k, x, size)) is not None:
            if self._now(options) and reason:
                self._warn(block, reason)
            return (self.before[block] or engine.attend)(q, k, v, options)
        _move(mixing.module, q.device)  # models on two devices may share students
        y, options[self, "finish"] = mixing(q, k, v, x, size)
        return y

    def finish(self, out: Tensor, options: Options) -> Tensor:
        """What the block's `to_out` gave, (B, L, D)."""
        if (self, "tokens") in options and self._now(options):
            self._warn(_block(options), "another node replaces it too, and comes later")
        finish: Finish | None = options.pop((self, "finish"), None)
        return out if finish is None else finish(out)

    def _now(self, options: Options) -> bool:
        if self.sigmas is None or "sigmas" not in options:
            return True
        first, last = self.sigmas
        return last <= float(options["sigmas"].max()) <= first

    @staticmethod
    def _hindrance(mixing: Mixing, q: Tensor, k: Tensor, x: Tensor | None, size: Size | None) -> str | None:
        """Why attention does it, if it does; without a word where that is the faster way."""
        if x is None or not x.shape == q.shape == k.shape or size is None:
            return "another node changes the tokens there (HyperTile, ToMe, a reference)"
        if q.shape[-1] != mixing.channels:
            return f"it has {mixing.channels} channels and the model {q.shape[-1]}: trained for another kind of model"
        if not mixing.serves(size):
            return "it serves the size it was trained at, and this picture has another"
        return None if mixing.pays(size) else ""

    def _warn(self, block: Block, reason: str) -> None:
        if reason not in self.warned:
            self.warned.add(reason)
            logging.warning("Hyena: attention stays in %s %d and the like: %s", *block[:2], reason)


def _move(module: nn.Module, device: torch.device) -> None:
    parameter = next(module.parameters(), None)
    if parameter is not None and parameter.device != device:
        module.to(device)


def _block(options: Options) -> Block | None:
    return (*options["block"], options.get("block_index", 0)) if options.get("block") else None


def _size(options: Options, tokens: int) -> Size | None:
    """The block's grid, if the tokens are the whole of it."""
    if "activations_shape" in options:
        height, width = options["activations_shape"][-2:]
        return (height, width) if height * width == tokens else None
    height, width = options["original_shape"][-2:]
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == tokens else None
