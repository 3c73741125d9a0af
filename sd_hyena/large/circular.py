"""Convolutions that go round a picture's borders, so that it continues at its opposite sides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from sd_hyena.large.around import replaced


@contextmanager
def circular_convolutions(network: nn.Module) -> Iterator[nn.Module]:
    """Within the block, each 3x3 convolution of a UNet or ControlNet sees the opposite side behind a border.

    Attention knows no places, so the prediction for latents turned by a multiple of the UNet's coarsest cell, 8 latent
    cells, is the prediction turned. For a canvas in one piece; tiles go round by themselves (`tiled_diffusion`).
    """
    with ExitStack() as stack:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and any(module.padding) and module.padding_mode == "zeros":
                stack.enter_context(replaced(module, "padding_mode", "circular"))
        yield network
