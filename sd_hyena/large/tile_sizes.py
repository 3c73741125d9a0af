"""How large a VAE's tiles may be: Tiled VAE's table, by the free memory of a GPU."""

from __future__ import annotations

from typing import Literal

import torch

Side = Literal["encoder", "decoder"]

TILE_SIZES = (  # Tiled VAE's: from so many GiB of free GPU memory, encoder px, decoder latents
    (30, {"encoder": 3072, "decoder": 256}),
    (16, {"encoder": 3072, "decoder": 192}),
    (12, {"encoder": 2048, "decoder": 128}),
    (8, {"encoder": 1536, "decoder": 96}),
    (0, {"encoder": 960, "decoder": 64}),
)
ON_CPU = {"encoder": 512, "decoder": 64}


def default_tile_size(side: Side, device: torch.device) -> int:
    """Of a tile of the image (encoder, px) or of the latents (decoder, cells)."""
    if device.type != "cuda":
        return ON_CPU[side]
    free = torch.cuda.mem_get_info(device)[0] / 2**30
    return next(sizes[side] for gib, sizes in TILE_SIZES if free >= gib)
