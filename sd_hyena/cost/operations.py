"""What an attention, a student or a whole UNet costs at a size, in floating-point operations. Nothing is computed.

A multiplication and an addition count two, an FFT of n points 2.5 n log2 n; elementwise work is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sd_hyena.cost.nothing_computed import nothing_computed
from sd_hyena.options.operators import operator_named
from sd_hyena.sites import Site
from sd_hyena.students.student import Projections, StudentSpec, build_student


def _fft(shape, dims, *_arguments, out_shape=None, **_options) -> int:
    real = max(shape, out_shape or shape, key=math.prod)  # of a real transform one side holds half as many, complex
    return int(2.5 * math.prod(real) * math.log2(max(math.prod(real[d] for d in dims), 2)))


def _attention(q, k, v, *_arguments, out_shape=None, **_options) -> int:
    (batch, heads, queries, width), keys = q, k[2]
    return 2 * batch * heads * queries * keys * (width + v[3])


def flops(call: Callable[[], Any]) -> int:
    """Operations of a call on fake tensors."""
    ops = torch.ops.aten
    missing = {ops._scaled_dot_product_flash_attention_for_cpu: _attention}
    missing |= dict.fromkeys([ops._fft_r2c, ops._fft_c2r, ops._fft_c2c], _fft)
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops()


def fake_block(
    spec: StudentSpec, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Projections, torch.Tensor]:
    """A student, frozen projections of `dtype` and one sample of tokens; to be called where nothing is computed."""
    d = spec.channels
    q, k, v, out = (nn.Linear(d, d, dtype=dtype).requires_grad_(False) for _ in range(4))
    projections = Projections(q, k, v, nn.ModuleList([out, nn.Identity()]))
    return build_student(spec), projections, torch.randn(1, size[0] * size[1], d, dtype=dtype)


def student_flops(spec: StudentSpec, size: tuple[int, int]) -> int:
    """Of a student's block as training computes it, its site's projections included, one sample on a grid (H, W)."""
    with nothing_computed():
        student, projections, x = fake_block(spec, size)
        student.requires_grad_(False)
        return flops(lambda: student(x, projections, size))


def folded_flops(spec: StudentSpec, size: tuple[int, int]) -> int:
    """The same as generation computes it, and for a student without training: the change of a projection is added to its
    weight, once, and is no product of its own."""
    return student_flops(spec, size) - change_flops(spec, size)


def change_flops(spec: StudentSpec, size: tuple[int, int]) -> int:
    """Of the trained changes of a student's projections, which training computes beside these."""
    streams = operator_named(spec.operator).count_streams(spec.options)
    return (streams + 1 if streams else 0) * 2 * size[0] * size[1] * spec.channels**2


def attention_flops(site: Site, size: tuple[int, int]) -> int:
    """Of a self-attention: four projections, the scores and their use."""
    tokens, d = size[0] * size[1], site.channels
    return 8 * tokens * d * d + 4 * tokens * tokens * d


class _Reached(Exception):
    """Ends a forward pass after a module."""


def unet_flops(unet: nn.Module, latent_size: tuple[int, int], last: str = "") -> int:
    """Of one forward for one sample; if `last` names a module, up to its answer."""
    held = {name: tensor.to("meta") for name, tensor in (*unet.named_parameters(), *unet.named_buffers())}
    like = {"dtype": next(unet.parameters()).dtype, "device": "meta"}  # a third of what fake tensors cost in Python
    latents = torch.empty(1, unet.config.in_channels, *latent_size, **like)
    text = torch.empty(1, 77, unet.config.cross_attention_dim, **like)
    told = {}
    if unet.config.addition_embed_type == "text_time":  # SDXL
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        told = {"text_embeds": text.new_empty(1, pooled), "time_ids": text.new_empty(1, 6)}
    timestep = torch.empty(1, dtype=torch.long, device="meta")

    def stop(*_) -> None:
        raise _Reached

    def call() -> None:
        with suppress(_Reached):
            functional_call(unet, held, (latents, timestep, text), {"added_cond_kwargs": told})

    hook = unet.get_submodule(last).register_forward_hook(stop) if last else None
    try:
        return flops(call)
    finally:
        if hook:
            hook.remove()


def vae_flops(vae: nn.Module, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Of encoding and of decoding one picture, in one piece."""
    with nothing_computed(allow_non_fake_inputs=True):
        p = next(vae.parameters())
        pixels, latents = (
            torch.randn(1, channels, *(scale * side for side in latent_size), dtype=p.dtype, device=p.device)
            for channels, scale in ((3, 8), (4, 1))
        )
        return flops(lambda: vae.encode(pixels)), flops(lambda: vae.decode(latents))
