"""The self-attentions of a ComfyUI UNet: the same sites, by the same short names, as its blocks.

IN04.1 is ("input", 4, 1): the second transformer block in input block 4. A name without a point means the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from sd_hyena.errors import BadInput
from sd_hyena.sites import Site

Block = tuple[str, int, int]
SIDES = {"IN": "input", "M": "middle", "OUT": "output"}


def block_of(short: str) -> Block:
    """Raises BadInput for what is no short name."""
    match = re.fullmatch(r"(IN|M|OUT)(\d+)(?:\.(\d+))?", short)
    if match is None:
        raise BadInput(f"{short!r} is no site's short name, such as IN01, M00 or OUT11.1")
    return SIDES[match[1]], int(match[2]), int(match[3] or 0)


def find_sites(unet: nn.Module) -> list[Site]:
    """In the order in which a forward meets them. Raises BadInput for a model that is no UNet of Stable Diffusion."""
    if not hasattr(unet, "input_blocks"):
        raise BadInput(f"this model is a {type(unet).__name__}; sites are known of SD 1.x, 2.x and SDXL")
    sites, level = [], 0
    for number, block in enumerate(unet.input_blocks):
        sites += _sites_of(block, f"input_blocks.{number}", f"IN{number:02d}", level)
        level += any(type(layer).__name__ == "Downsample" for layer in block)
    sites += _sites_of(unet.middle_block or (), "middle_block", "M00", level)
    for number, block in enumerate(unet.output_blocks):
        sites += _sites_of(block, f"output_blocks.{number}", f"OUT{number:02d}", level)
        level -= any(type(layer).__name__ == "Upsample" for layer in block)
    return sites


def _sites_of(block: nn.Module, path: str, short: str, level: int) -> Iterator[Site]:
    for place, layer in enumerate(block):
        blocks = getattr(layer, "transformer_blocks", ())
        for k, one in enumerate(blocks):
            name = f"{path}.{place}.transformer_blocks.{k}.attn1"
            yield Site(
                name, short if len(blocks) == 1 else f"{short}.{k}", one.norm1.normalized_shape[0], one.n_heads, level
            )
