"""The header of a `.safetensors` file: what it holds, told without loading a tensor, or torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.files.container import check_packed

LARGEST = 100_000_000  # bytes, the specification's own limit
PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a torch.save zip, bare pickles


def tensor_names(path: str | Path) -> list[str]:
    """Names of the tensors that the header lists; whether they are there is not looked at.

    Raises BadInput for a header that is none: cut, too long, no JSON object, a key twice.
    """
    return [name for name in _header(path) if name != "__metadata__"]


def notes(path: str | Path) -> dict[str, str]:
    """What the header says beside its tensors. Raises BadInput."""
    found = _header(path).get("__metadata__")
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def _header(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    check_packed(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(LARGEST, size - 8):
            looks = (
                "looks like a PyTorch pickle (.pt, .ckpt)"
                if prefix[:2] in PICKLES
                else "is truncated or something else"
            )
            raise BadInput(f"not a valid safetensors file: {str(path)!r} ({size} bytes) {looks}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
        if isinstance(header, dict):
            return header
        error: Exception = ValueError("no JSON object")
    except (ValueError, RecursionError) as damage:
        error = damage
    raise BadInput(f"not a valid safetensors file: {str(path)!r} ({str(error)[:200]})")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice in its header")
    return result
