"""What TensorBoard shows of a run beside its curves: options as text and as HPARAMS, and charts that hold many curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import yaml

from sd_hyena.sites import Site

ERROR = "val/log10_relative_mse/"


def describe(writer: Any, options: dict[str, Any], sites: Sequence[Site]) -> None:
    """Tell a SummaryWriter of a run's options and how its curves belong together (the tab CUSTOM SCALARS)."""
    writer.add_text("config", f"```yaml\n{yaml.safe_dump(options, sort_keys=False)}```")
    _add_hparams(writer, options, [f"val/relative_mse/{site.short}" for site in sites] + ["val/image_psnr"])
    writer.add_custom_scalars(layout(sites))


def layout(sites: Sequence[Site]) -> dict[str, dict[str, list]]:
    """A chart for each level of the UNet, a line for each of its sites."""
    levels: dict[int, list[str]] = defaultdict(list)
    for site in sites:
        levels[site.level].append(site.short)
    shown = {"log10 of the relative error": ERROR, "cosine": "val/cosine/", "loss": "train/loss/"}
    return {
        title: {
            f"level {level}": ["Multiline", [f"{tag}{short}" for short in names]] for level, names in levels.items()
        }
        for title, tag in shown.items()
    }


def _add_hparams(writer: Any, options: dict[str, Any], metrics: Sequence[str]) -> None:
    """Lightning's own writes a first value of each metric too, which the curves would begin with."""
    from torch.utils.tensorboard.summary import hparams

    for summary in hparams(options, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
