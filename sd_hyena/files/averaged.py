"""A UNet's averaged weights (EMA) of the original training code, which stores their names without dots."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from sd_hyena.files.weights_kind import AVERAGED, UNET

T = TypeVar("T")
WORDS = "input_blocks output_blocks middle_block time_embed label_emb in_layers emb_layers out_layers skip_connection "
WORDS += (
    "transformer_blocks proj_in proj_out attn1 attn2 to_q to_k to_v to_out norm1 norm2 norm3 norm ff net proj op conv "
)
WORDS += "out weight bias"
NUMBERS = (r"(?<=put_blocks)\d+(?=\d)", r"(?<=label_emb)\d(?=\d)", r"\d+")  # of the block, then of the layer in it
PIECE = re.compile("|".join([*NUMBERS, *sorted(WORDS.split(), key=len, reverse=True)]))


def averages_as_weights(tensors: Mapping[str, T]) -> dict[str, T]:
    """What a file holds, by names; where it has the averaged UNet alone, that is the UNet."""
    if any(name.startswith(UNET) for name in tensors):
        return dict(tensors)
    return {_restored(name): value for name, value in tensors.items()}


def _restored(name: str) -> str:
    flat = name.removeprefix(AVERAGED)
    pieces = PIECE.findall(flat)
    return UNET + ".".join(pieces) if flat != name and "".join(pieces) == flat else name
