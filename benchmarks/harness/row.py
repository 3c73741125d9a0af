"""A line of a suite's table. The first columns are those of huggingface/diffusion-fast, so its readers can read ours.

Times are in seconds: `time (secs)` is the mean, as there; compare medians."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness.rounds import Compared
from benchmarks.harness.setting import Setting

SHOWN = ("tag", "size", "site", "method", "status", "median", "p10", "p90", "faster", "roofline")
SHOWN = (*SHOWN, "allocated (MiB)", "reserved (MiB)")


@dataclass(frozen=True)
class Row:
    """One method at one size; what was not measured stays empty.

    site: a short name, or what of the UNet has students. error: against the reference, relative.
    roofline: the share of the machine's measured ceilings. predicted: how many times cheaper by operations.
    """

    setting: Setting
    suite: str
    size: tuple[int, int]  # pixels, height and width
    method: str
    site: str = ""
    batch: int = 1
    tokens: int = 0
    status: str = "ok"
    error: float | None = None
    compared: Compared | None = None
    roofline: float | None = None
    gflop: float | None = None
    predicted: float | None = None
    allocated: float | None = None
    reserved: float | None = None
    pipeline_cls: str = ""
    ckpt_id: str = "random weights"
    steps: int = 1
    optimize: tuple[str, ...] = ("sdpa",)
    note: str = ""

    def columns(self) -> dict[str, Any]:
        """By name, as they are written."""
        setting, compared, on = self.setting, self.compared, self.optimize
        seconds, ratio = (compared.seconds, compared.ratio) if compared else (None, None)
        total = torch.cuda.get_device_properties(setting.device).total_memory / 2**30 if setting.on_gpu else None

        def digits(value: float | None, form: str = ".4g") -> str:
            return "" if value is None else format(value, form)

        return {
            "pipeline_cls": self.pipeline_cls,
            "ckpt_id": self.ckpt_id,
            "bf16": setting.dtype == torch.bfloat16 or "bf16" in on,
            "sdpa": "sdpa" in on,
            "fused_qkv_projections": "qkv" in on,
            "upcast_vae": False,
            "batch_size": self.batch,
            "num_inference_steps": self.steps,
            "compile_unet": "compile" in on or "graphs" in on,
            "compile_vae": False,
            "compile_mode": "reduce-overhead" if "graphs" in on else "default" if "compile" in on else "",
            "change_comp_config": False,
            "do_quant": "int8dynamic" if "int8" in on else "",
            "time (secs)": digits(seconds and seconds.mean),
            "memory (gbs)": digits(self.allocated and self.allocated / 1024),
            "actual_gpu_memory (gbs)": digits(total),
            "tag": self.suite,
            "size": "{1}x{0}".format(*self.size),
            "method": self.method,
            "site": self.site,
            "tokens": self.tokens or "",
            "dtype": str(setting.dtype).removeprefix("torch."),
            "status": self.status,
            "error": digits(self.error, ".1e"),
            "median": digits(seconds and seconds.median),
            "p10": digits(seconds and seconds.p10),
            "p90": digits(seconds and seconds.p90),
            "ratio": digits(ratio and ratio.median),
            "ratio_p10": digits(ratio and ratio.p10),
            "ratio_p90": digits(ratio and ratio.p90),
            "noise": digits(compared and compared.noise, ".2g"),
            "faster": compared.verdict if compared else "",
            "predicted": digits(self.predicted, ".3g"),
            "gflop": digits(self.gflop),
            "roofline": digits(self.roofline, ".2f"),
            "allocated (MiB)": digits(self.allocated, ".0f"),
            "reserved (MiB)": digits(self.reserved, ".0f"),
            "note": self.note,
        }
