"""`safari` and the light part of `sd_hyena`, found within this folder, beside it, or installed.

They are imported by their own names, as they import themselves; the search path stays as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("safari", "sd_hyena")


def bring_in(name: str) -> None:
    """Import a package of ours. Raises ImportError where it is nowhere."""
    files = [folder / name / "__init__.py" for folder in (HERE, HERE.parent)]
    file = next((file for file in files if file.is_file()), None)
    if name in sys.modules or (file is None and importlib.util.find_spec(name)):
        return
    if file is None:
        raise ImportError(f"{name} is missing: copy safari and sd_hyena into {HERE}, or clone the whole repository")
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for name in NAMES:
    bring_in(name)
