"""Hashes of many or large files, shown as work: nobody waits for gigabytes to be read without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sd_hyena.files.hashes import Read, file_sha256
from sd_hyena.processes.progress import work

Digest = Callable[[Path, Read], str]
GB = 1e9  # bytes


def shown_hashes(files: Sequence[Path], what: str, digest: Digest = file_sha256) -> Iterator[str]:
    """The hash of each file in turn; `what` is said, with the gigabytes, if it takes long."""
    sizes = [file.stat().st_size for file in files]
    done = 0
    with work(f"{what}, GB", round(sum(sizes) / GB, 2) or None, announced=False) as shown:

        def read(more: int) -> None:
            nonlocal within
            within += more
            shown.to((done + within) / GB)

        for file, size in zip(files, sizes, strict=True):
            within = 0
            yield digest(file, read)
            done += size
            shown.to(done / GB)
