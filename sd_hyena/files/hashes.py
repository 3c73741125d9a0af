"""Hashes of files of weights, as A1111 writes them into its pictures; each file is read once."""

from __future__ import annotations

import functools
import hashlib
import json
import struct
from pathlib import Path

CHUNK = 1 << 20


def file_sha256(path: str | Path) -> str:
    """Of the whole file: of models, VAEs and embeddings."""
    return _sha256(*_known(path), 0)


def lora_sha256(path: str | Path) -> str:
    """Of a LoRA: what kohya's trainer noted, else of the tensors behind a safetensors header, so that notes do not count."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        return file_sha256(path)
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        header = file.read(min(length, 100_000_000))
    try:
        noted = json.loads(header).get("__metadata__", {}).get("sshs_model_hash", "")
    except (ValueError, RecursionError, AttributeError):
        noted = ""
    return noted if isinstance(noted, str) and noted else _sha256(*_known(path), 8 + length)


def _known(path: str | Path) -> tuple[str, int, int]:
    """What tells whether a file is the one that was read before."""
    found = Path(path).stat()
    return str(path), found.st_size, found.st_mtime_ns


@functools.lru_cache(maxsize=4096)
def _sha256(path: str, size: int, modified: int, start: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(min(start, size))
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
