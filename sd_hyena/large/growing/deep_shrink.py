"""Deep Shrink (Kohya, 2023): features of an early block are made smaller until the picture's composition stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.large.growing.inner_maps import (
    InnerMaps,
    changing_input,
    changing_output,
    inner_maps,
    input_units,
    networks,
    units,
)
from sd_hyena.large.growing.resized import resized
from sd_hyena.large.growing.stages import times
from sd_hyena.large.tiling import Size

MODES = ("bicubic", "bilinear", "nearest-exact", "area")


@dataclass(frozen=True, kw_only=True)
class DeepShrink:
    """Where, how much and how long maps are made smaller; the defaults are ComfyUI's. Raises BadInput.

    block: the input block behind which, LDM's number; 3 is the first downsampler of SD 1.x, 2.x and SDXL.
    factor: by which both sides are divided; 1 changes nothing, bit for bit.
    start, end: the part of the noise schedule, 0 (pure noise) to 1, end excluded.
    after_skip: the map that is joined on the way up keeps its size; False makes that one smaller too.
    mode: how a map is made smaller; it is made larger again by bicubic interpolation.
    own: cells of a side of the square that the model draws by itself. Then what the UNet meets, the canvas, a tile or a
        region, is made smaller by as much as it is larger than that, at least by the factor, and not at all if it is not;
        0 is always by the factor.
    circular: maps go on at their opposite sides.
    """

    block: int = 3
    factor: float = 2.0
    start: float = 0.0
    end: float = 0.35
    after_skip: bool = True
    mode: Literal["bicubic", "bilinear", "nearest-exact", "area"] = "bicubic"
    own: float = 0.0
    circular: bool = False

    def __post_init__(self):
        if type(self.block) is not int or self.block < 1:
            raise BadInput(f"block={self.block!r} must be an input block's number from 1; 3 is usual")
        if not 1 <= self.factor <= 16:
            raise BadInput(f"factor={self.factor!r} must be from 1 to 16; 2 halves both sides")
        if not 0 <= self.start <= self.end <= 1:
            raise BadInput(f"start={self.start!r} and end={self.end!r} must be 0 <= start <= end <= 1")
        if self.mode not in MODES:
            raise BadInput(f"mode={self.mode!r} is unknown; use {', '.join(MODES)}")
        if not 0 <= self.own < math.inf:
            raise BadInput(f"own={self.own!r} must be cells of the model's own side; 0 does not look at the size")

    def factor_at(self, size: Size) -> float:
        """By which the sides of a call's maps are divided."""
        if not self.own or self.factor == 1:
            return self.factor
        larger = times(size, self.own)
        return max(self.factor, larger) if larger > 1 else 1.0

    def acts(self, done: float, size: Size) -> bool:
        return self.factor_at(size) != 1 and self.start <= done < self.end


@contextmanager
def deep_shrink(pipe: Any, **options) -> Iterator[DeepShrink]:
    """Within the block, the maps behind an input block of `pipe`'s UNet and ControlNets are smaller for a while.

    `pipe` is any diffusers pipeline of SD 1.x, 2.x or SDXL; the options are DeepShrink's. A canvas larger than the
    training size is composed as if it had that size, in one stage; whatever stands at a site learns the smaller (H, W)
    as ever. Yields the options. Afterwards, also after an exception, everything is as it was. Raises BadInput.
    """
    options = DeepShrink(**options)
    with ExitStack() as stack:
        for network in networks(pipe):
            blocks = input_units(network)
            behind = [*blocks, *units(network.mid_block)] if network.mid_block is not None else blocks
            if not options.block < len(behind) or options.block > len(blocks):
                last = min(len(blocks), len(behind) - 1)
                raise BadInput(f"block={options.block} is no input block of this UNet, which has 1 to {last}")
            timesteps = pipe.scheduler.config.num_train_timesteps
            maps = stack.enter_context(inner_maps(network, timesteps, options.acts, options.circular))
            change = _Shrunk(maps, options)
            if options.after_skip:
                stack.callback(changing_input(behind[options.block].first, change))
            else:
                stack.callback(changing_output(blocks[options.block - 1].last, change))
        yield options


class _Shrunk:
    """A map (B, C, H, W) made smaller, at least one cell, while that is on."""

    def __init__(self, maps: InnerMaps, options: DeepShrink):
        self.maps, self.options = maps, options

    def __call__(self, x: Tensor) -> Tensor:
        if not self.maps.active:
            return x
        factor = self.options.factor_at(self.maps.size)
        size = tuple(max(round(side / factor), 1) for side in x.shape[-2:])
        return resized(x, size, self.options.mode, self.options.circular)


DEFAULTS = asdict(DeepShrink())
