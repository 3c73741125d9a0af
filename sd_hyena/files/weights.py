"""Tensors and their metadata on disk: `.safetensors`, or `.pt` read without executing anything."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.container import check_packed, is_safetensors
from sd_hyena.files.safetensors_header import tensor_names

LARGEST_PT = 4 << 30  # bytes a .pt of ours may claim to unpack to
BEFORE_ZIP = (
    b"\x8a\x0a" + torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") + b"."
)  # what torch < 1.6 wrote first
INERT = (  # what old checkpoints pickle beside their tensors; it becomes an object that does nothing
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
WITHIN = ("state_dict", "tensors")  # Lightning's, ours
MAPPING = "torch.nn.modules.container.ParameterDict"  # of the original textual inversion


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file and its metadata strings. Raises BadInput for what is not exactly such a file."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{str(path)!r} is no file")
    check_packed(path, "a .safetensors or .pt file")
    return _read_safetensors(path) if is_safetensors(path) else _read_pt(path)


def read_checkpoint(path: str | Path, within: Sequence[str] = WITHIN) -> dict[str, Tensor]:
    """The tensors of whatever `.safetensors`, `.ckpt`, `.pt`, `.pth` or `.bin` a user has.

    They stay on disk until they are used. Of a pickle the state dict alone is taken, which may lie `within` others by
    these names. Raises BadInput.
    """
    path = Path(path)
    check_packed(path)
    if is_safetensors(path):
        return _read_safetensors(path)[0]
    content = read_pickle(path, path.stat().st_size, mmap=True)
    content = content if isinstance(content, dict) else {}
    for name in within:
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


def shapes_of(path: str | Path) -> Mapping[str, tuple[int, ...]]:
    """What `read_checkpoint` would give, by its sizes; of a `.safetensors` the header alone is read. Raises BadInput."""
    path = Path(path)
    check_packed(path)
    return _shapes(path, stamps(path))


def stamps(*paths: Path) -> tuple[tuple[str, int, int], ...]:
    """By which it is known whether files have changed."""
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths))


@lru_cache(maxsize=16)
def _shapes(path: Path, _stamps: tuple) -> Mapping[str, tuple[int, ...]]:
    if not is_safetensors(path):
        return MappingProxyType({name: tuple(value.shape) for name, value in read_checkpoint(path).items()})
    with _opened(path) as file:
        names = file.keys()  # a safe_open is no mapping
        return MappingProxyType({name: tuple(file.get_slice(name).get_shape()) for name in names})


def check_weights(path: str | Path) -> None:
    """Raise BadInput for a damaged `.safetensors`, and for a pickle that could inflate; reads no tensor."""
    path = Path(path)
    check_packed(path)
    if is_safetensors(path):
        check_safetensors(path)
    else:
        _check_pickled(path, path.stat().st_size)


def check_safetensors(path: str | Path) -> None:
    """Raise BadInput unless the file's header is whole and covers the file; reads no tensor."""
    with _opened(Path(path)):
        pass


def _opened(path: Path) -> Any:
    tensor_names(path)
    try:
        return safe_open(str(path), framework="pt")
    except Exception as error:  # whatever the library raises
        raise BadInput(f"not a valid safetensors file: {str(path)!r} ({str(error)[:200]})") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened(path) as file:
        names = file.keys()  # a safe_open is no mapping
        try:
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
        except Exception as error:  # a dtype that PyTorch lacks
            raise BadInput(f"{str(path)!r} cannot be read ({' '.join(str(error).split())[:200]})") from None


def _read_pt(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content = read_pickle(path)
    tensors = content.get("tensors") if isinstance(content, dict) else None
    metadata = content.get("metadata", {}) if isinstance(content, dict) else {}
    good = isinstance(tensors, dict) and isinstance(metadata, dict)
    if not good or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise BadInput(f"{str(path)!r} is no .pt of train.py: expected tensors and metadata")
    return tensors, metadata


def _check_pickled(path: Path, largest: int) -> None:
    """Raise BadInput for what torch.save did not write, or what claims more than `largest` bytes."""
    with path.open("rb") as file:
        start = file.read(16)
    if _is_archive(path):
        _check_archive(path, largest)
    elif start[2:].startswith(BEFORE_ZIP):
        _check_claims(path, largest)
    else:
        looks = "a safetensors file" if start[8:9] == b"{" else "no file of torch.save"
        looks += ", or a truncated one" if start.startswith(b"PK") else ""
        raise BadInput(f"{str(path)!r} looks like {looks}; expected what torch.save writes, whole")


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except Exception as error:  # of a damaged archive zipfile raises whatever it stumbles over, here too
        raise BadInput(f"{str(path)!r} is a damaged archive ({str(error)[:160]})") from None


def _check_archive(path: Path, largest: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # of a damaged archive zipfile raises whatever it stumbles over
        raise BadInput(f"{str(path)!r} is a damaged archive ({str(error)[:160]})") from None
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise BadInput(f"{str(path)!r} is a program of TorchScript, which was not executed; give the weights alone")
    unpacked = sum(info.file_size for info in infos)
    if unpacked > largest or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise BadInput(f"{str(path)!r} would unpack to {unpacked} bytes or is compressed; torch.save writes neither")


def _check_claims(path: Path, largest: int) -> None:
    """What torch < 1.6 wrote: magic number, version, machine, content, each pickled, then the numbers.

    The number before each storage's identity is its length. Nothing of the pickles is executed.
    """
    claimed, number = 0, 0
    try:
        with path.open("rb") as file:
            for _ in range(4):
                for code, argument, _ in pickletools.genops(file):
                    number = argument if isinstance(argument, int) and "INT" in code.name else number
                    claimed = max(claimed, number) if code.name == "BINPERSID" else claimed
    except Exception as error:  # of a damaged pickle pickletools raises whatever it stumbles over
        raise BadInput(f"{str(path)!r} is a damaged file of torch.save ({str(error)[:160]})") from None
    if claimed > min(largest, path.stat().st_size):
        raise BadInput(f"{str(path)!r} is no honest file: it claims {claimed} numbers, more than are stored")


def _check_sums(path: Path) -> None:
    """Raise BadInput for numbers that are not those that were written: torch.load passes over the archive's sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of a damaged archive zipfile raises whatever it stumbles over
        damaged = str(error)[:160]
    if damaged is not None:
        raise BadInput(f"{str(path)!r} is damaged: not what was written ({damaged})")


def read_pickle(path: str | Path, largest: int = LARGEST_PT, mmap: bool = False) -> Any:
    """The content of a file of torch.save that claims at most `largest` bytes; nothing of it is executed. Raises BadInput.

    With `mmap` the tensors stay on disk until they are used, but for those of a file that torch < 1.6 wrote.
    """
    path = Path(path)
    check_packed(path)
    _check_pickled(path, largest)
    archive = _is_archive(path)
    if archive and not mmap:
        _check_sums(path)
    inert = [(_Inert, name) for name in INERT]
    try:
        with torch.serialization.safe_globals([*inert, (_Mapping, MAPPING)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and archive)
    except Exception as error:  # pickle's errors have no common base
        asked = re.search(r"GLOBAL (\S+)", str(error))
        reason = (
            f"it asks for {asked[1]}" if asked else " ".join(str(error).rpartition("Unpickler error:")[2].split())[:160]
        )
        raise BadInput(f"{str(path)!r} holds more than tensors and was not executed ({reason})") from None


class _Inert:
    """Takes whatever a pickle gives it."""

    def __init__(self, *_given: Any):
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


class _Mapping(dict):
    """A ParameterDict of any version of torch: the parameters by their names."""

    def __setstate__(self, state: Any) -> None:
        parameters = state.get("_parameters") if isinstance(state, dict) else None
        self.update(parameters if isinstance(parameters, dict) else {})


def write_weights(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `.safetensors` or `.pt`, all or nothing."""
    path = Path(path)
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        if is_safetensors(path):
            save_file(tensors, temporary, metadata)
        else:
            torch.save({"tensors": tensors, "metadata": metadata}, temporary)
