"""diffusers' AutoencoderKL as steps."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownEncoderBlock2D,
    AttnUpDecoderBlock2D,
    DownEncoderBlock2D,
    UNetMidBlock2D,
    UpDecoderBlock2D,
)
from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.large.steps import Add, Attend, Down, Local, Norm, Step, Up

BLOCKS = (UNetMidBlock2D, DownEncoderBlock2D, UpDecoderBlock2D, AttnDownEncoderBlock2D, AttnUpDecoderBlock2D)


def _resnet(block: ResnetBlock2D) -> list[Step]:
    first = [Norm(block.norm1, keeps=True), Local(block.nonlinearity), Local(block.conv1, 1)]
    return [
        *first,
        Norm(block.norm2),
        Local(block.nonlinearity),
        Local(block.conv2, 1),
        Add(block.conv_shortcut, block.output_scale_factor),
    ]


def _attend(attention: Attention) -> Attend:
    layers = attention.to_q, attention.to_k, attention.to_v, nn.Sequential(*attention.to_out)
    return Attend(attention.group_norm, *layers, attention.heads, attention.rescale_output_factor)


def _block(block: nn.Module) -> Iterator[Step]:
    """Of the middle, or of a level of the encoder or decoder."""
    if not isinstance(block, BLOCKS):
        raise BadInput(f"this VAE has a {type(block).__name__}, which tiles cannot follow; use mode='blend'")
    for resnet, attention in zip_longest(block.resnets, getattr(block, "attentions", ())):
        yield from _resnet(resnet)
        if attention is not None:
            yield _attend(attention)
    yield from map(Down, getattr(block, "downsamplers", None) or ())
    yield from map(Up, getattr(block, "upsamplers", None) or ())


def _out(part: nn.Module) -> list[Step]:
    return [Norm(part.conv_norm_out), Local(part.conv_act), Local(part.conv_out, 1)]


def encoder_steps(vae: AutoencoderKL) -> list[Step]:
    """From an image to the moments of its latents. Raises BadInput for blocks of another kind."""
    part = vae.encoder
    blocks = [step for block in (*part.down_blocks, part.mid_block) for step in _block(block)]
    quant = [] if vae.quant_conv is None else [Local(vae.quant_conv)]
    return [Local(part.conv_in, 1), *blocks, *_out(part), *quant]


def decoder_steps(vae: AutoencoderKL) -> list[Step]:
    """From latents to an image. Raises BadInput for blocks of another kind."""
    part = vae.decoder
    quant = [] if vae.post_quant_conv is None else [Local(vae.post_quant_conv)]
    blocks = [step for block in (part.mid_block, *part.up_blocks) for step in _block(block)]
    return [*quant, Local(part.conv_in, 1), *blocks, *_out(part)]
