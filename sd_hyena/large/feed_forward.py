"""Feed-forward layers on some tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.around import Around, standing
from sd_hyena.sites import find_sites


class Chunked(Around):
    """A module that treats every token alike, called on at most `chunk` tokens of each sample at a time."""

    def __init__(self, chunk: int):
        super().__init__()
        self.chunk = chunk

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """(B, L, D) -> (B, L, D')."""
        return torch.cat([self.inner(x, *args, **kwargs) for x in hidden_states.split(self.chunk, dim=1)], dim=1)


@contextmanager
def chunk_feed_forward(unet: nn.Module, /, ff_chunk_size: int = 4096) -> Iterator[nn.Module]:
    """Within the block, the feed-forward layers of a UNet's or ControlNet's transformers work on `ff_chunk_size` tokens at a time.

    The same result for any number of tokens, in less memory (LargeResPatch; Phylliida, 2022). Yields the UNet. Raises
    BadInput before anything is changed.
    """
    if ff_chunk_size < 1:
        raise BadInput(f"ff_chunk_size={ff_chunk_size} must be at least 1 token; 4096 is usual")
    if not hasattr(unet, "down_blocks"):
        raise BadInput(f"no feed-forward to chunk in {type(unet).__name__}; give pipe.unet")
    with ExitStack() as stack:
        for site in find_sites(unet):
            block = unet.get_submodule(site.name.removesuffix(".attn1"))
            stack.enter_context(standing(block, "ff", Chunked(ff_chunk_size)))
        yield unet
