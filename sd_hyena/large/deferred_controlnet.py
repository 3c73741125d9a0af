"""A ControlNet on a canvas that is drawn in tiles: called once by the pipeline, at work with each tile."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.unet_call import Call, each, stacked


class DeferredControlNet:
    """A ControlNet whose work waits for the UNet's call, to be done tile by tile.

    The pipeline calls it first, on the whole canvas, and gets a gate of ones (B, 1, 1, 1) in place of the residuals. What
    the pipeline then does to the batch (in guess mode it puts zeros before it) is read from the gate.
    """

    def __init__(self, controlnet: nn.Module, scale: int):
        self.original, self.signature = controlnet.forward, inspect.signature(controlnet.forward)
        self.scale = scale  # pixels a cell
        self.arguments: dict[str, Any] | None = None

    def forward(self, *args, **kwargs) -> Any:
        """Same arguments as the ControlNet's; returns gates."""
        self.arguments = self.signature.bind(*args, **kwargs).arguments
        return_dict = self.arguments.pop("return_dict", True)
        sample = self.arguments["sample"]
        each(functools.partial(self._check, sample), self.arguments["controlnet_cond"])
        gate = sample.new_ones(len(sample), 1, 1, 1)
        if not return_dict:
            return [gate], gate
        from diffusers.models.controlnets.controlnet import ControlNetOutput

        return ControlNetOutput(down_block_res_samples=(gate,), mid_block_res_sample=gate)

    def _check(self, sample: Tensor, image: Tensor) -> None:
        (height, width), (h, w) = image.shape[-2:], (self.scale * cells for cells in sample.shape[-2:])
        if (height, width) != (h, w):
            raise BadInput(f"the control image is {width}x{height}, the picture {w}x{h}; give it the picture's size")

    def joining(self, arguments: dict[str, Any]) -> Call:
        """A call of the UNet with the deferred one of the ControlNet, if gates came with it."""
        gate = arguments.get("mid_block_additional_residual")
        if self.arguments is None or gate is None or gate.shape[1:] != (1, 1, 1):
            return Call(arguments, None, None)
        residuals = ("down_block_additional_residuals", "mid_block_additional_residual")
        return Call({k: v for k, v in arguments.items() if k not in residuals}, self.arguments, gate.flatten() > 0)

    def residuals(self, parts: list[dict[str, Any]], gate: Tensor) -> dict[str, Any]:
        """The UNet's residual arguments for some views of one size; zero in the rows where the gate is."""

        def rows_of_the_unet(x: Tensor) -> Tensor:
            every = x.new_zeros(len(parts), len(gate), *x.shape[1:])
            every[:, gate] = x.unflatten(0, (len(parts), -1))
            return every.flatten(0, 1)

        arguments = stacked(parts, len(parts[0]["sample"]))
        down, middle = self.original(**arguments, return_dict=False)
        return {
            "down_block_additional_residuals": [rows_of_the_unet(x) for x in down],
            "mid_block_additional_residual": rows_of_the_unet(middle),
        }
