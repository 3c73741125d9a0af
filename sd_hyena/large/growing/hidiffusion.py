"""HiDiffusion's RAU-Net (Zhang et al. 2023): deep maps keep about the size that they had in training.

Its other half, self-attention in windows of half the map that shift from step to step, is not built. What comes near is
`brick_attention(..., attn_shape="shifted")`: windows of 64 cells, whatever the map, that do not go round its borders.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.growing.inner_maps import (
    InnerMaps,
    changing_output,
    inner_maps,
    input_units,
    networks,
    units,
)
from sd_hyena.large.growing.resized import resized
from sd_hyena.large.growing.stages import times
from sd_hyena.large.tiling import Size

AGGRESSIVE = 8 / 50  # of SDXL's steps, as published
SPREAD = {"stride": (4, 4), "dilation": (2, 2), "padding": (2, 2)}  # of a 3x3 convolution of stride 2
SPREAD["_reversed_padding_repeated_twice"] = [2] * 4  # which is what a circular one pads by
EXTREME = 4  # times the model's own size, from which on the second switch is needed


@dataclass(frozen=True, kw_only=True)
class HiDiffusion:
    """How long each of RAU-Net's two changes is on; the defaults are those published for twice the own size. Raises BadInput.

    t1: the part of the noise schedule (0 is pure noise) before which the first change is on. SD 1.x, 2.x: the first
        downsampler takes every fourth cell with its kernel spread by two, the last upsampler brings four times as many
        back. SDXL: means of 2x2 cells in the second block, bicubic enlarging in the last but one.
    t2: the same of the second change, for canvases from four times the own size on. SD 1.x, 2.x: the means in the second
        block; SDXL: its downsampler, which takes every fourth cell.
    aggressive: SDXL's second change stands alone, in place of the first, before this part; None is .16 where t2 is 0,
        as published. Of no meaning in SD 1.x and 2.x.
    own: cells of a side of the square that the model draws by itself. Then t1 and t2 are the `switches` for what the UNet
        meets, the canvas, a tile or a region, and nothing changes where that is not larger; 0 is always t1 and t2.
    circular: maps go on at their opposite sides.
    """

    t1: float = 0.4
    t2: float = 0.0
    aggressive: float | None = None
    own: float = 0.0
    circular: bool = False

    def __post_init__(self):
        for name in ("t1", "t2", "aggressive"):
            value = getattr(self, name)
            if not (value is None and name == "aggressive") and not 0 <= value <= 1:
                raise BadInput(f"{name}={value!r} must be a part of the noise schedule, 0 to 1; 0 turns it off")
        if self.t2 > self.t1:
            raise BadInput(f"t2={self.t2!r} must not be above t1={self.t1!r}, the first change lasts longest")

        if not 0 <= self.own < math.inf:
            raise BadInput(f"own={self.own!r} must be cells of the model's own side; 0 does not look at the size")

    def at(self, size: Size) -> HiDiffusion:
        """Those of a call whose latents have this (H, W)."""
        if not self.own:
            return self
        larger = times(size, self.own) > 1
        return replace(self, own=0.0, **switches(size, (self.own,) * 2) if larger else {"t1": 0.0, "t2": 0.0})

    def first(self, sdxl: bool, done: float) -> bool:
        """Whether the first change is on."""
        return self._alone(sdxl) <= done < self.t1

    def second(self, sdxl: bool, done: float) -> bool:
        """Whether the second change is on."""
        return done < max(self.t2, self._alone(sdxl))

    def _alone(self, sdxl: bool) -> float:
        if not sdxl:
            return 0.0
        given = self.aggressive
        return min(self.t1, given if given is not None else AGGRESSIVE if self.t2 == 0 else 0.0)


def switches(canvas: Size, own: Size) -> dict[str, float]:
    """t1 and t2 as published for a canvas and a model's own size, in the same unit."""
    extreme = min(side / mine for side, mine in zip(canvas, own, strict=True)) >= EXTREME
    return {"t1": 0.7, "t2": 0.3} if extreme else {"t1": 0.4, "t2": 0.0}


@contextmanager
def hidiffusion(pipe: Any, **options) -> Iterator[HiDiffusion]:
    """Within the block, `pipe`'s UNet is RAU-Net, and so are its ControlNets, as far as they go.

    `pipe` is any diffusers pipeline of SD 1.x, 2.x or SDXL; the options are HiDiffusion's, t1 = t2 = 0 changes nothing.
    Any (H, W): a map that does not divide is rounded up. Yields the options. Afterwards, also after an exception,
    everything is as it was. Raises BadInput.
    """
    options = HiDiffusion(**options)
    with ExitStack() as stack:
        for network in networks(pipe):
            input_units(network)
            sdxl = not getattr(network.down_blocks[0], "attentions", None)
            acts = functools.partial(_acts, options, sdxl)
            timesteps = pipe.scheduler.config.num_train_timesteps
            maps = stack.enter_context(inner_maps(network, timesteps, acts, options.circular))
            first, second = (functools.partial(_is_on, name, options, sdxl, maps) for name in ("first", "second"))
            if sdxl:
                _pooled(stack, network, 1, first)
                _sampled(stack, network, 1, second, maps)
            else:
                _sampled(stack, network, 0, first, maps)
                _pooled(stack, network, 1, second)
        yield options


def _acts(options: HiDiffusion, sdxl: bool, done: float, size: Size) -> bool:
    there = options.at(size)
    return there.first(sdxl, done) or there.second(sdxl, done)


def _is_on(change: str, options: HiDiffusion, sdxl: bool, maps: InnerMaps) -> bool:
    return getattr(options.at(maps.size), change)(sdxl, maps.done)


def _pooled(stack: ExitStack, network: nn.Module, level: int, on: Callable[[], bool]) -> None:
    """Means of 2x2 cells behind the first ResNet and attention of a down block; what lies opposite meets by itself."""
    if level >= len(network.down_blocks):
        raise BadInput(f"a UNet of {len(network.down_blocks)} blocks has no second one for RAU-Net; use deep_shrink")

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True) if on() else x

    stack.callback(changing_output(units(network.down_blocks[level])[0].last, mean))


def _sampled(stack: ExitStack, network: nn.Module, level: int, on: Callable[[], bool], maps: InnerMaps) -> None:
    """Every fourth cell behind a down block in place of every second, and four times as many before the block opposite."""
    down = network.down_blocks[level]
    if not getattr(down, "downsamplers", None):
        raise BadInput(f"block {level} of this UNet has no downsampler for RAU-Net to replace; use deep_shrink")
    downsampler = down.downsamplers[0]
    if not downsampler.use_conv or downsampler.padding != 1:
        raise BadInput("RAU-Net replaces a downsampler that is a padded convolution, which this UNet's is not")
    stack.enter_context(replaced(downsampler, "forward", _Downsampler(downsampler, on)))
    if hasattr(network, "up_blocks"):
        upsampler = network.up_blocks[-level - 2].upsamplers[0]
        stack.enter_context(replaced(upsampler, "forward", _Upsampler(upsampler, on, maps.circular)))


class _Downsampler:
    """A downsampler's forward with its convolution spread: stride 4, dilation 2, padding 2, while that is on.

    Whatever stands around the convolution (a LoRA has a second one of the same stride) is spread with it.
    """

    def __init__(self, module: nn.Module, on: Callable[[], bool]):
        self.module, self.forward, self.on = module, module.forward, on
        functools.update_wrapper(self, self.forward)

    def __call__(self, *args, **kwargs) -> Tensor:
        if not self.on():
            return self.forward(*args, **kwargs)
        halving = [m for m in self.module.modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        with ExitStack() as stack:
            for convolution in halving:
                for name, value in SPREAD.items():
                    stack.enter_context(replaced(convolution, name, value))
            return self.forward(*args, **kwargs)


class _Upsampler:
    """An upsampler's forward that enlarges fourfold, nearest neighbour and then bicubic, before its convolution."""

    def __init__(self, module: nn.Module, on: Callable[[], bool], circular: bool):
        self.module, self.forward, self.on, self.circular = module, module.forward, on, circular
        functools.update_wrapper(self, self.forward)

    def __call__(self, hidden_states: Tensor, output_size: Size | None = None, *args, **kwargs) -> Tensor:
        if not self.on() or output_size is None:
            return self.forward(hidden_states, output_size, *args, **kwargs)
        half = tuple(-(-side // 2) for side in output_size)
        x = resized(resized(hidden_states, half, "nearest"), output_size, circular=self.circular)
        return (self.module.conv if self.module.name == "conv" else self.module.Conv2d_0)(x)


DEFAULTS = asdict(HiDiffusion())
