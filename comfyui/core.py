"""`safari` and the light part of `sd_hyena`: within this folder, beside it (a clone of the repository), or installed.

They are imported by their own names, as they import themselves; the search path stays as it is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def bring_in(name: str, folders: list[Path]) -> None:
    """Import a package from the first of the folders, or as it is installed. Raises ImportError."""
    if name in sys.modules or (not folders and importlib.util.find_spec(name)):
        return
    if not folders:
        raise ImportError(f"{name} is missing; docs/comfyui.md says what belongs into this folder, {HERE}")
    file = folders[0] / name / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


for name in ("safari", "sd_hyena"):
    bring_in(name, [folder for folder in (HERE, HERE.parent) if (folder / "sd_hyena" / "sites.py").is_file()])
