"""The pack as one folder that needs nothing beside it: for custom_nodes, and for the registry's archive.

python comfyui/gather.py FOLDER
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OURS = ("safari", "sd_hyena")


def needed() -> list[Path]:
    """The files of `safari` and `sd_hyena` that the pack's modules import, directly or not."""
    todo, found = [path for path in HERE.glob("*.py") if path.name != "gather.py"], set()
    while todo:
        for path in _imported(todo.pop()) - found:
            found.add(path)
            todo.append(path)
    return sorted(found)


def _imported(path: Path) -> set[Path]:
    names, nodes = set(), [ast.parse(path.read_text("utf-8"))]
    while nodes:
        node = nodes.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names if name.split(".")[0] in OURS]
    files = {ROOT.joinpath(*p[:n], "__init__.py") for p in parts for n in range(1, len(p) + 1)}
    files |= {ROOT.joinpath(*p).with_suffix(".py") for p in parts}
    return {file for file in files if file.is_file()}


def gather(folder: Path) -> None:
    """Raises FileExistsError where there is such a folder."""
    leave = shutil.ignore_patterns("__pycache__", "gather.py")
    shutil.copytree(HERE, folder, ignore=leave)
    for file in needed():
        copy = folder / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    gather(Path(sys.argv[1]))
