"""Hashes of files of weights, as A1111 writes them into its pictures; each file is read once."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

CHUNK = 1 << 22
Read = Callable[[int], object]  # told of so many bytes more
_known: dict[tuple, str] = {}


def file_sha256(path: str | Path, read: Read = int) -> str:
    """Of the whole file: of models, VAEs and embeddings."""
    return _sha256(path, 0, read)


def lora_sha256(path: str | Path, read: Read = int) -> str:
    """Of a LoRA: what kohya's trainer noted, else of the tensors behind a safetensors header, so that notes do not count."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return file_sha256(path, read)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(min(length, 100_000_000))
    try:
        noted = json.loads(header).get("__metadata__", {}).get("sshs_model_hash", "")
    except (ValueError, RecursionError, AttributeError):
        noted = ""
    return noted if isinstance(noted, str) and noted else _sha256(path, 8 + length, read)


def _sha256(path: str | Path, start: int, read: Read) -> str:
    """Read anew only if path, size or time tell of another file."""
    seen = os.stat(path)
    key = os.path.abspath(path), seen.st_size, seen.st_mtime_ns, start
    if key not in _known:
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            file.seek(min(start, seen.st_size))
            while block := file.read(CHUNK):
                digest.update(block)
                read(len(block))
        _known[key] = digest.hexdigest()
    return _known[key]
