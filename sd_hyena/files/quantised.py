"""Weights of eight bits as the numbers that they stand for: float8 widened, scales multiplied in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from sd_hyena.errors import BadInput

T = TypeVar("T")
SCALE = re.compile(r"(.*\.)(scale_weight|weight_scale)$")  # ComfyUI's, older and newer, beside `weight`
MARK = re.compile(
    r"(^|\.)(scaled_fp8|scale_input|input_scale)$"
)  # for arithmetic in eight bits, which is not done here
FORMAT = ".comfy_quant"  # JSON in bytes beside a weight: how it is quantised
IN_BLOCKS = re.compile(r"\.(absmax|quant_map|nested_absmax|weight_scale_2)$|\.quant_state\.")  # nf4, fp4, nvfp4


def unquantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without scales and marks: those of float8 exactly as float16, those with a scale as float32.

    Raises BadInput, which says how, for what is quantised in another way.
    """
    for name, value in tensors.items():
        if name.endswith(FORMAT):
            _check_format(name, value)
    result = {}
    for name, value in without_scales(tensors).items():
        scales = (f"{name.removesuffix('weight')}{kind}" for kind in ("scale_weight", "weight_scale"))
        scale = next(filter(tensors.__contains__, scales), None) if name.endswith(".weight") else None
        result[name] = widened(value) if scale is None else _scaled(value, scale, tensors[scale])
    return result


def without_scales(tensors: Mapping[str, T]) -> dict[str, T]:
    """What is left of the names when scales are multiplied in. Raises BadInput for weights in blocks."""
    if name := next(filter(IN_BLOCKS.search, tensors), None):
        raise BadInput(f"it is quantised in blocks of 4 bits ({name}); give a file of float8, float16 or float32")
    extra = lambda name: name.endswith(FORMAT) or MARK.search(name) or _is_scale(name, tensors)
    return {name: value for name, value in tensors.items() if not extra(name)}


def widened(value: Tensor) -> Tensor:
    """A tensor of float8 as float16, exactly; powers of two (e8m0) as float32; any other as it is."""
    if value.dtype == torch.float8_e8m0fnu:
        return value.to(torch.float32)
    return value.to(torch.float16) if value.is_floating_point() and value.itemsize == 1 else value


def _is_scale(name: str, tensors: Mapping[str, Any]) -> bool:
    match = SCALE.match(name)
    return match is not None and f"{match[1]}weight" in tensors


def _scaled(value: Tensor, name: str, scale: Tensor) -> Tensor:
    if scale.numel() not in (1, len(value) if value.ndim else 1):
        raise BadInput(f"{name} is of {tuple(scale.shape)}; known are one scale, and one for each row of the weight")
    one_a_row = scale.to(torch.float32).reshape(-1, *[1] * (value.ndim - 1)) if value.ndim else scale.reshape(())
    return value.to(torch.float32) * one_a_row


def _check_format(name: str, value: Tensor) -> None:
    try:
        said = json.loads(bytes(value.to(torch.uint8).tolist()))["format"]
    except (ValueError, LookupError, TypeError, RuntimeError, RecursionError):
        raise BadInput(f"{name} does not say how its weight is quantised") from None
    if not str(said).startswith("float8_e"):
        raise BadInput(f"it is quantised as {str(said)[:40]} ({name}); give a file of float8, float16 or float32")
