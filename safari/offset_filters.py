"""Implicit filters as functions of an offset in cells, not of a position in a sequence: one serves every height and width.

C filter channels, r the reach: offsets -r ... r along each of one or two axes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OffsetFilter(nn.Module):
    """`h(D) = MLP(sines of D) exp(-rate |D|)` at every offset D of `axes` axes, |D| the Euclidean length.

    The rates are learned, one per channel, and start at reaches from 1 to 16 cells. The last layer starts small.
    """

    def __init__(self, channels: int, axes: int, *, order: int = 32, bands: int = 8, start: float = 0.1):
        super().__init__()
        if channels < 1 or order < 1 or bands < 1 or axes not in (1, 2):
            raise ValueError(f"{channels=}, {order=} and {bands=} must be positive, {axes=} 1 or 2")
        self.axes = axes
        wavelengths = 4 * 2 ** torch.linspace(0, 6, bands)  # cells: from 4 to 256
        self.register_buffer("frequencies", 2 * math.pi / wavelengths, persistent=False)
        self.first = nn.Linear(2 * bands * axes, order)
        self.hidden = nn.Linear(order, order)
        self.last = nn.Linear(order, channels, bias=False)
        self.last.weight.data.mul_(start)
        self.log_rate = nn.Parameter(-torch.linspace(0, math.log(16), channels))

    def forward(self, *reach: int, channels: slice = slice(None)) -> Tensor:
        """The filter for these reaches, (C, 2 r + 1) or (C, 2 r_y + 1, 2 r_x + 1), of all channels or some.

        In float32 whatever the autocast.
        """
        device = self.log_rate.device
        offsets = torch.stack(
            torch.meshgrid(*(torch.arange(-r, r + 1, device=device) for r in reach), indexing="ij"), dim=-1
        ).to(self.log_rate.dtype)
        angle = (offsets[..., None] * self.frequencies.to(offsets)).flatten(-2)
        with torch.autocast(device.type, enabled=False):
            z = torch.cat([angle.cos(), angle.sin()], dim=-1)
            h = F.linear(torch.sin(self.hidden(torch.sin(self.first(z)))), self.last.weight[channels])
            window = torch.exp(-offsets.norm(dim=-1, keepdim=True) * self.log_rate[channels].exp())
            return (h * window).movedim(-1, 0)
