"""The texts in a file of torch.save, its tensors' names among them, told without torch: nothing of it is executed."""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path

from sd_hyena.errors import BadInput

LARGEST = 1 << 26  # bytes of a pickle that are looked at
PICKLES = 4  # of a file of torch < 1.6: magic number, version, machine, content


def pickled_texts(path: str | Path) -> list[str]:
    """Raises BadInput for what torch.save did not write."""
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return [text for _ in range(PICKLES) for text in _texts(file)]
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            with archive.open(name) as file:
                return _texts(file.read(LARGEST))
    except Exception as error:  # of a damaged file zipfile and pickletools raise whatever they stumble over
        raise BadInput(f"{str(path)!r} is a damaged file of torch.save ({str(error)[:160]})") from None


def _texts(pickle) -> list[str]:
    return [argument for _, argument, _ in pickletools.genops(pickle) if isinstance(argument, str)]
