"""Tensors and their metadata on disk: `.safetensors`, or `.pt` read without executing anything."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.safetensors_header import tensor_names
from sd_hyena.files.weights_kind import PICKLED

LARGEST_PT = 4 << 30  # bytes a .pt of ours may claim to unpack to
INERT = (  # what old checkpoints pickle beside their tensors; it becomes an object that does nothing
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata strings. Raises BadInput for what is not exactly such a file."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{str(path)!r} is no file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLED:
        return _read_pt(path)
    raise BadInput(f"{str(path)!r}: expected a .safetensors or .pt file")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of whatever `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` a user has.

    They stay on disk until they are used. Of a pickle the state dict alone is taken. Raises BadInput.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    if path.suffix not in PICKLED:
        raise BadInput(f"{str(path)!r}: expected a .safetensors or .ckpt file")
    content = read_pickle(path, path.stat().st_size, mmap=True)
    content = content if isinstance(content, dict) else {}
    for name in ("state_dict", "tensors"):  # Lightning's, ours
        if isinstance(content.get(name), dict):
            content = content[name]
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided
    }
    for name, value in tensors.items():
        if value.nbytes > value.untyped_storage().nbytes():
            raise BadInput(f"{str(path)!r} is no honest file: {name} claims more numbers than are stored")
    return tensors


def check_weights(path: str | Path) -> None:
    """Raise BadInput for a damaged `.safetensors`, and for a pickle that could inflate; reads no tensor."""
    path = Path(path)
    if path.suffix == ".safetensors":
        check_safetensors(path)
    elif path.suffix in PICKLED:
        _check_archive(path, path.stat().st_size)


def check_safetensors(path: str | Path) -> None:
    """Raise BadInput unless the file's header is whole and covers the file; reads no tensor."""
    tensor_names(path)
    try:
        with safe_open(str(path), framework="pt"):
            pass
    except (ValueError, SafetensorError) as error:
        raise BadInput(f"not a valid safetensors file: {str(path)!r} ({str(error)[:200]})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_safetensors(path)
    with safe_open(str(path), framework="pt") as file:
        names = file.keys()  # a safe_open is no mapping
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def _read_pt(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_pickle(path)
    tensors = content.get("tensors") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else {}
    good = isinstance(tensors, dict) and isinstance(metadata, dict)
    if not good or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise BadInput(f"{str(path)!r} is no .pt of train.py: expected tensors and metadata")
    return tensors, metadata


def _check_archive(path: Path, largest: int) -> None:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(16)
        looks = "a safetensors file" if start[8:9] == b"{" else "no file of torch.save"
        looks += ", or a truncated one" if start.startswith(b"PK") else ""
        raise BadInput(f"{str(path)!r} looks like {looks}; expected what torch.save writes, whole")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise BadInput(f"{str(path)!r} is a damaged archive ({str(error)[:160]})") from None
    unpacked = sum(info.file_size for info in infos)
    if unpacked > largest or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise BadInput(f"{str(path)!r} would unpack to {unpacked} bytes or is compressed; torch.save writes neither")


def _check_sums(path: Path) -> None:
    """Raise BadInput for numbers that are not those that were written: torch.load passes over the archive's sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, OSError, EOFError) as error:
        damaged = str(error)[:160]
    if damaged is not None:
        raise BadInput(f"{str(path)!r} is damaged: not what was written ({damaged})")


def read_pickle(path: str | Path, largest: int = LARGEST_PT, mmap: bool = False) -> Any:
    """The content of a file of torch.save that claims at most `largest` bytes; nothing of it is executed. Raises BadInput."""
    path = Path(path)
    _check_archive(path, largest)
    if not mmap:
        _check_sums(path)
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in INERT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # pickle's errors have no common base
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {asked[1]}" if asked else " ".join(str(error).split())[:160]
        raise BadInput(f"{str(path)!r} holds more than tensors and was not executed ({reason})") from None


class _Inert:
    """Takes whatever a pickle gives it."""

    def __init__(self, *_given: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def write_weights(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `.safetensors` or `.pt`, all or nothing."""
    path = Path(path)
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file(tensors, temporary, metadata)
        else:
            torch.save({"tensors": tensors, "metadata": metadata}, temporary)


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
