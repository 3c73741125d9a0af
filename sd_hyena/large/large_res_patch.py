"""LargeResPatch: bricks, chunked feed-forward and the two-pass VAE under one name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from sd_hyena.large.bricks import Shape
from sd_hyena.large.feed_forward import chunk_feed_forward
from sd_hyena.large.tiled_attention import brick_attention

LARGEST_PLAIN = 1024  # pixels; up to here nothing is patched


@contextmanager
def LargeResPatch(
    pipe: Any,
    width: int,
    height: int,
    attn_slice_x: int = 64,
    attn_slice_y: int = 64,
    attn_shape: Shape = "brick",
    ff_chunk_size: int = 4096,
    padding_mode: Literal["constant", "circular"] = "constant",
    vae_chunk_size_x: int = 64,
    vae_chunk_size_y: int = 64,
) -> Iterator[Any]:
    """Within the block, `pipe` draws images larger than 1024 pixels with bricks, chunks and a two-pass VAE.

    After Phylliida's StableDiffusionLargeResPatch (2022). `width`, `height` are pixels and decide only whether anything
    is patched; slices and VAE chunks are in tokens. A VAE chunk is square: the smaller of its two sizes counts.
    `circular` pads the VAE with the opposite border, for pictures that tile. Yields the pipeline. Raises BadInput.
    """
    from sd_hyena.large.tiled_vae import tiled_vae

    with ExitStack() as stack:
        if max(width, height) > LARGEST_PLAIN:
            chunk = min(vae_chunk_size_x, vae_chunk_size_y)
            sizes = {"encoder_tile_size": 8 * chunk, "decoder_tile_size": chunk}
            stack.enter_context(brick_attention(pipe.unet, attn_slice_x, attn_slice_y, attn_shape))
            stack.enter_context(chunk_feed_forward(pipe.unet, ff_chunk_size))
            stack.enter_context(tiled_vae(pipe.vae, mode="two_pass", padding_mode=padding_mode, **sizes))
        yield pipe
