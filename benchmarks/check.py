"""python -m benchmarks.check [DEVICE]: everything that would be timed, at awkward sizes, against float64. Exits with 1 if wrong.

The published operator with its half-precision FFT is expected to fail on inputs with a mean, and only told.
"""

from __future__ import annotations

import math
import sys

import torch

from benchmarks.harness.contest import error_of
from benchmarks.harness.gate import verdict
from benchmarks.harness.layouts import new_students, sites, states, unet_on
from benchmarks.harness.methods import kernels_chosen, methods
from benchmarks.harness.setting import Setting
from benchmarks.suites import block, core
from benchmarks.suites.unet import error_of_students
from sd_hyena.processes.device import pick_device

GRIDS = {"IN01": ((40, 56), (37, 64)), "IN04": ((24, 31),), "M00": ((9, 13),)}  # H != W, primes


def failures(setting: Setting, unet_too: bool) -> list[str]:
    """What is wrong; prints every verdict."""
    found, known = [], sites()
    print(f"{setting.dtype}: PyTorch's attention by head width: {kernels_chosen(setting)}")
    work = [(f"{s} {h}x{w}", methods(known[s], (h, w), setting), known[s]) for s, g in GRIDS.items() for h, w in g]
    work.append(("core 40x56", core.methods((40, 56), setting), known["IN01"]))
    for where, all_of_them, site in work:
        h, w = (int(side) for side in where.split()[1].split("x"))
        x = block.tokens_of(setting, 2, h * w, site.channels)
        for method in all_of_them:
            error = error_of(method, x)
            said = verdict(error, setting.dtype)
            print(f"{where} {method.name}: {said if math.isfinite(error) else 'failed: no numbers'}", flush=True)
            if said != "ok" and "half FFT" not in method.name:
                found.append(f"{setting.dtype} {where} {method.name}")
    if unet_too:
        unet = unet_on("sd15", setting.device, setting.dtype)
        error = error_of_students(unet, setting, new_students(unet, "all", setting))
        if verdict(error, setting.dtype) != "ok":
            found.append(f"{setting.dtype} students inside the UNet")
        assert torch.isfinite(unet(**states(unet, setting, (8, 8), 2)).sample).all()
    return found


@torch.no_grad()
def main(device: str = "auto") -> int:
    """Check float32, and on a GPU bfloat16 too."""
    where = pick_device(device)
    dtypes = (torch.float32, torch.bfloat16) if where.type == "cuda" else (torch.float32,)
    wrong = [line for dtype in dtypes for line in failures(Setting(where, dtype, True), where.type == "cuda")]
    print("\n".join(["WRONG:", *wrong]) if wrong else "all right")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
