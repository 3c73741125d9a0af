"""python -m benchmarks.studies.saved_activations: memory that training one student keeps for its backward pass.

At the largest self-attentions of SD 1.5 (IN01) and SDXL (IN04.0).

Counted on fake tensors, one sample, without the teacher and the transient buffers: what a batch costs on any card.
"""

from __future__ import annotations

from itertools import product

import torch

from benchmarks.harness.record import write
from sd_hyena.cost.activations import saved_bytes
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import Site
from sd_hyena.students.student import spec_for

SITES = {
    "SD 1.5": Site("IN01", "IN01", channels=320, heads=8, level=0),
    "SDXL": Site("IN04.0", "IN04.0", channels=640, heads=10, level=1),
}
OPERATORS = {
    "hyena2d": {},
    "hyena2d, 256 clusters": {"operator_options": "landmarks=256"},
    "hyena2d, full filter": {"operator_options": "long=full"},
    "linear": {},
    "bidirectional": {},
}


def main() -> None:
    """Count."""
    rows = []
    for (model, site), (name, options) in product(SITES.items(), OPERATORS.items()):
        operator = name.split(",")[0]
        given = TrainConfig(operator=operator, **options).options_of_operator()
        for pixels in (512, 1024, 2048):
            latent_size = (pixels // 8, pixels // 8)
            spec, size = spec_for(site, operator, given, latent_size), site.size(*latent_size)
            found = {dtype: saved_bytes(spec, size, dtype) / 2**30 for dtype in (torch.float32, torch.bfloat16)}
            gib = {f"{str(dtype).removeprefix('torch.')}_GiB": round(value, 2) for dtype, value in found.items()}
            rows.append({"model": model, "site": site.short, "student": name, "pixels": pixels, **gib})
    write("saved_activations", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
