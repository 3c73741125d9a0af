"""ComfyUI's VAE of Stable Diffusion as steps, which tiles can follow; its modules have the names of the original."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import zip_longest

from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.steps import Add, Attend, Down, Local, Norm, Step, Up

from . import engine


def encoder_steps(vae: nn.Module) -> list[Step]:
    """From an image to the moments of its latents. Raises BadInput for another kind of VAE."""
    part = _part(vae, "encoder", engine.Encoder)
    levels = [step for level in part.down for step in _level(level)]
    return [Local(part.conv_in, 1), *levels, *_middle(part.mid), *_out(part), *_quant(vae, "quant_conv")]


def decoder_steps(vae: nn.Module) -> list[Step]:
    """From latents to an image. Raises BadInput for another kind of VAE."""
    part = _part(vae, "decoder", engine.Decoder)
    levels = [step for level in reversed(part.up) for step in _level(level)]
    return [*_quant(vae, "post_quant_conv"), Local(part.conv_in, 1), *_middle(part.mid), *levels, *_out(part)]


def _part(vae: nn.Module, name: str, kind: type) -> nn.Module:
    part = getattr(vae, name, None)
    plain = type(part) is kind and type(part.mid.attn_1) is engine.AttnBlock and isinstance(part.conv_in, nn.Conv2d)
    if not plain or getattr(vae, "bn", None) is not None or getattr(part, "tanh_out", False):
        raise BadInput(
            f"this VAE ({type(vae).__name__}, {type(part).__name__}) is not Stable Diffusion's, the kind whose tiles can "
            f"be exact; use ComfyUI's own VAE nodes"
        )
    return part


def _level(level: nn.Module) -> Iterator[Step]:
    for block, attention in zip_longest(level.block, level.attn):
        yield from _resnet(block)
        if attention is not None:
            yield _attend(attention)
    if hasattr(level, "downsample"):
        yield Down(level.downsample)
    if hasattr(level, "upsample"):
        yield Up(level.upsample)


def _middle(mid: nn.Module) -> list[Step]:
    return [*_resnet(mid.block_1), _attend(mid.attn_1), *_resnet(mid.block_2)]


def _resnet(block: nn.Module) -> list[Step]:
    if type(block) is not engine.ResnetBlock:
        raise BadInput(f"this VAE has a {type(block).__name__}, which tiles cannot follow; use ComfyUI's own VAE nodes")
    first = [Norm(block.norm1, keeps=True), Local(block.swish), Local(block.conv1, 1)]
    shortcut = getattr(block, "nin_shortcut", None)
    return [*first, Norm(block.norm2), Local(block.swish), Local(block.conv2, 1), Add(shortcut)]


def _attend(attention: nn.Module) -> Attend:
    layers = (partial(_of_each, conv) for conv in (attention.q, attention.k, attention.v, attention.proj_out))
    return Attend(attention.norm, *layers)


def _of_each(conv: nn.Module, tokens: Tensor) -> Tensor:
    """A 1x1 convolution of tokens (B, L, C)."""
    return conv(tokens.mT[..., None])[..., 0].mT


def _out(part: nn.Module) -> list[Step]:
    return [Norm(part.norm_out), Local(nn.SiLU()), Local(part.conv_out, 1)]


def _quant(vae: nn.Module, name: str) -> list[Step]:
    conv = getattr(vae, name, None)
    return [] if conv is None else [Local(conv)]
