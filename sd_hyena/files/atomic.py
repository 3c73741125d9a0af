"""Files that are either the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path, put: Callable[[Path, Path], object] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed to disk and `put` in its place.

    After an exception (a full disk, an interrupt) the previous file stands and the temporary one is gone. The temporary
    file lies in the same folder, so neither $TMPDIR nor another file system matters; its mode follows the umask.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:60]}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        (put or os.replace)(temporary, path)
    finally:
        with suppress(OSError):  # Windows takes away no file that is open; what went wrong before is what counts
            temporary.unlink()
