"""The maps inside a UNet, some of which a method makes smaller for a while, and how they meet the others again.

Block numbers are LDM's: input block 0 is conv_in, then every ResNet (with the attention behind it) and every downsampler
counts one. B batch, C channels, (H, W) cells of a map.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.large.growing.resized import resized
from sd_hyena.large.tiling import Size

RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
ADAPTERS = "down_intrablock_additional_residuals"


class Unit(NamedTuple):
    """One block: the module that takes its map and the one that gives it."""

    first: nn.Module
    last: nn.Module


def networks(pipe: Any) -> list[nn.Module]:
    """The UNet of a pipeline, then its ControlNets, whose maps must have the UNet's sizes."""
    controlnet = getattr(pipe, "controlnet", None)
    return [pipe.unet, *filter(None, getattr(controlnet, "nets", (controlnet,)))]


def units(block: nn.Module) -> list[Unit]:
    """Of a down, middle or up block: its ResNets with the attentions behind them, then its downsampler."""
    attentions = list(getattr(block, "attentions", None) or ())
    if len(attentions) > len(block.resnets):
        raise BadInput(f"{type(block).__name__} is no block of a Stable Diffusion UNet, the method does not know it")
    behind = attentions + [None] * (len(block.resnets) - len(attentions))
    found = [Unit(resnet, other or resnet) for resnet, other in zip(block.resnets, behind, strict=True)]
    return found + [Unit(downsampler, downsampler) for downsampler in getattr(block, "downsamplers", None) or ()]


def input_units(network: nn.Module) -> list[Unit]:
    """The input blocks of a UNet or ControlNet from number 1 on. Raises BadInput for a network that is neither."""
    blocks = getattr(network, "down_blocks", ())
    if not blocks or not all(hasattr(block, "resnets") for block in blocks):
        raise BadInput(f"{type(network).__name__} is no Stable Diffusion UNet; give a pipeline of SD 1.x, 2.x or SDXL")
    return [unit for block in blocks for unit in units(block)]


def changing_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """From now on `module` gets its map, the first argument, changed; returns what ends that."""

    def hook(_module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, kwargs | {name: change(kwargs[name])}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def changing_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """From now on `module` gives its map changed, alone or first of a tuple; returns what ends that."""

    def hook(_module, _args, output):
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    return module.register_forward_hook(hook).remove


class InnerMaps:
    """What is known of a network's call while it runs: how far the drawing is, and which maps wait to be joined.

    `done` is the part of the noise schedule, 0 at pure noise, that lies behind the call; `size` the (H, W) of its latents,
    in tiles that of the tile at hand.
    """

    def __init__(self, network: nn.Module, timesteps: int, acts: Callable[[float, Size], bool], circular: bool):
        self.network, self.timesteps, self._acts, self.circular = network, timesteps, acts, circular
        self.done, self.size, self.waiting, self.given = 0.0, (0, 0), [], {}
        self.joining: list[Size] = []  # of the up block that is at work: what it joins, first to last

    @property
    def active(self) -> bool:
        return self._acts(self.done, self.size)

    def note(self, arguments: dict[str, Any]) -> None:
        """Before a call of the network. Raises BadInput for what cannot be fitted to smaller maps."""
        timestep = float(torch.as_tensor(arguments["timestep"]).max())
        self.done = min(max(1 - timestep / self.timesteps, 0), 1)
        self.size = tuple(arguments["sample"].shape[-2:])
        self.given = {name: arguments[name] for name in RESIDUALS if arguments.get(name) is not None}
        adapters = arguments.get(ADAPTERS) or (len(self.given) == 1 and self.given.get(RESIDUALS[0]))
        if self.active and adapters:
            raise BadInput(
                "a T2I-Adapter's maps do not fit a UNet whose own are made smaller; leave one of the two out"
            )

    def started(self, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        """Behind conv_in."""
        self.size = tuple(output.shape[-2:])
        self.waiting = [self.size]

    def went_down(self, block: nn.Module, _args: tuple, output: Any) -> None:
        """Behind a down block."""
        self.waiting += [tuple(skip.shape[-2:]) for skip in output[1]]
        if self.active and block is self.network.down_blocks[-1]:
            self._check_residuals()

    def _check_residuals(self) -> None:
        down = self.given.get(RESIDUALS[0], ())
        sizes = [tuple(residual.shape[-2:]) for residual in down]
        for size, ours in zip(sizes, self.waiting):  # noqa: B905 - the UNet, too, stops at the shorter
            if size not in ((1, 1), ours):  # ones stand for a ControlNet that waits for its tile
                raise BadInput(
                    f"a ControlNet's map of {size[1]}x{size[0]} cells meets one of the UNet's that was made "
                    f"{ours[1]}x{ours[0]}; give the pipeline the ControlNet itself, whose maps are then made smaller too"
                )

    def goes_up(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Before an up block: its map gets the size of what it is joined with first, its upsampler that of what follows."""
        if not self.active:
            return None
        bound = inspect.signature(type(block).forward).bind(block, *args, **kwargs).arguments
        bound.pop("self")
        bound |= bound.pop("kwargs", {})
        joined = bound["res_hidden_states_tuple"]
        self.joining = [tuple(skip.shape[-2:]) for skip in reversed(joined)]
        del self.waiting[-len(joined) :]
        bound["hidden_states"] = resized(bound["hidden_states"], self.joining[0], circular=self.circular)
        if getattr(block, "upsamplers", None) and self.waiting:
            bound["upsample_size"] = self.waiting[-1]
        return (), bound

    def meets(self, number: int, x: Tensor) -> Tensor:
        """Behind ResNet and attention `number` of an up block."""
        return resized(x, self.joining[number + 1], circular=self.circular) if self.active else x


@contextmanager
def inner_maps(
    network: nn.Module, timesteps: int, acts: Callable[[float, Size], bool], circular: bool = False
) -> Iterator[InnerMaps]:
    """Within the block, a UNet or ControlNet works whatever size its maps are given on the way down, while
    `acts(done, size)`; `circular` ones are enlarged round their borders.

    Before a map is joined with one of the way down it gets that one's size (bicubic; by an upsampler as ever, nearest
    neighbour before the convolution). Where `acts` says no, and where no size was changed, the call is what it was bit
    for bit. Afterwards, also after an exception, the network is as it was. Raises BadInput.
    """
    input_units(network)
    maps, signature = InnerMaps(network, timesteps, acts, circular), inspect.signature(network.forward)
    forward = network.forward

    @functools.wraps(forward)
    def noted(*args, **kwargs):
        maps.note(signature.bind(*args, **kwargs).arguments)
        return forward(*args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(replaced(network, "forward", noted))
        stack.callback(network.conv_in.register_forward_hook(maps.started).remove)
        for block in network.down_blocks:
            stack.callback(block.register_forward_hook(maps.went_down).remove)
        for block in getattr(network, "up_blocks", ()):
            stack.callback(block.register_forward_pre_hook(maps.goes_up, with_kwargs=True).remove)
            for number, unit in enumerate(units(block)[:-1]):
                stack.callback(changing_output(unit.last, functools.partial(maps.meets, number)))
        yield maps
