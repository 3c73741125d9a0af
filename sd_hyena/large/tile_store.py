"""Where whole feature maps wait while they are worked on tile by tile: on the device, in RAM, or in a file on disk."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from typing import IO, Literal

import torch
from torch import Tensor

from sd_hyena.errors import BadInput

Offload = Literal["none", "cpu", "disk"]


class TileStore:
    """Gives out maps and forgets them: a map's memory or file is free again when its last reference is gone.

    Maps are (B, H, W, C), so that a tile's rows are long runs of bytes and the cells are an attention's tokens.
    Those on disk are files without a name in the folder of `tempfile` ($TMPDIR moves it): nothing has to be removed,
    not even after a kill.
    """

    def __init__(self, offload: Offload, device: torch.device):
        self.on_disk = offload == "disk"
        self.device = device if offload == "none" else torch.device("cpu")
        self.files: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A map with undefined content. Raises BadInput where the disk has no room for it."""
        if not self.on_disk:
            return torch.empty(shape, dtype=dtype, device=self.device)
        n_bytes = math.prod(shape) * dtype.itemsize
        try:
            with tempfile.TemporaryFile() as file:
                _reserve(file, n_bytes)
                mapped = mmap.mmap(file.fileno(), n_bytes)
        except OSError as error:
            raise BadInput(
                f"offload='disk' needs {n_bytes / 2**30:.2f} GiB more in {tempfile.gettempdir()}: {error.strerror}; "
                f"free some space, or let TMPDIR name another folder"
            ) from error
        self.files.add(mapped)
        return torch.frombuffer(mapped, dtype=dtype).view(shape)

    def settle(self) -> None:
        """Let go of the resident pages of the maps on disk; their content stays in the files."""
        for mapped in self.files if hasattr(mmap, "MADV_DONTNEED") else ():
            mapped.madvise(mmap.MADV_DONTNEED)


def _reserve(file: IO[bytes], n_bytes: int) -> None:
    """Take the blocks now: on a full disk a write into a mapped hole would kill the process (SIGBUS)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    for start in range(0, n_bytes, 2**20):
        file.write(bytes(min(2**20, n_bytes - start)))
    file.flush()
