"""Memory that a call has in hand at most. Nothing is computed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from sd_hyena.cost.nothing_computed import nothing_computed


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and still referred to."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {id(one.untyped_storage()) for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)}
        made = function(*args, **(kwargs or {}))
        for one in tree_iter(made):
            if isinstance(one, Tensor) and id(storage := one.untyped_storage()) not in given:
                self._count(storage)
        return made

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen and self._seen[key]() is storage:
            return

        def gone(_reference: Any) -> None:
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the tensors that `call` makes and has alive at once, at most; to be called where nothing is computed."""
    with torch.no_grad(), _Live() as live:
        call()
    return live.most


def unet_peak_bytes(unet: nn.Module, latent_size: tuple[int, int], batch: int, dtype: torch.dtype) -> int:
    """What one forward of a UNet has in hand at most, its weights left out, with kernels that keep no scores."""
    with nothing_computed():
        empty = lambda *shape: torch.empty(*shape, dtype=dtype)
        weights = {name: empty(*p.shape) for name, p in (*unet.named_parameters(), *unet.named_buffers())}
        latents = empty(batch, unet.config.in_channels, *latent_size)
        text = empty(batch, 77, unet.config.cross_attention_dim)
        told = {}
        if unet.config.addition_embed_type == "text_time":  # SDXL
            pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
            told = {"added_cond_kwargs": {"text_embeds": empty(batch, pooled), "time_ids": empty(batch, 6)}}
        given = (latents, torch.zeros(1, dtype=torch.long), text)
        return peak_bytes(lambda: torch.func.functional_call(unet, weights, given, told))
