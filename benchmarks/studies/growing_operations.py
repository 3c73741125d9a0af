"""python -m benchmarks.studies.growing_operations: what a large picture costs, drawn plainly and grown, counted.

Operations of all denoising steps with guidance, for the layouts of Stable Diffusion 1.5 and SDXL, in one piece; a stage but
the first takes its share of the steps. Students are the default operator's at every self-attention. The VAE is left out.
"""

from __future__ import annotations

import functools

from benchmarks.harness.layouts import unet_on
from benchmarks.harness.record import write
from sd_hyena.cost.operations import attention_flops, folded_flops, unet_flops
from sd_hyena.generate.growth import strength_at
from sd_hyena.large.growing.stages import sizes
from sd_hyena.options.growing import AUTO
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites
from sd_hyena.students.student import spec_for

OWN = {"sd15": 512, "sdxl": 1024}


def main(steps: int = 30, sides: tuple[int, ...] = (2048, 4096, 8192)) -> None:
    """Count each layout at each size.

    Args:
        steps: of a drawing; a later stage takes the strength's share of them
        sides: of the square pictures, in pixels
    """
    train, rows = TrainConfig(), []
    for layout, own in OWN.items():
        unet = unet_on(layout, "meta")
        sites = find_sites(unet)
        saved: dict[tuple, int] = {}

        @functools.cache
        def step(side: int, unet=unet, sites=sites, saved=saved) -> tuple[int, int]:
            """With attention, and with students."""
            cells, gained = (side // 8,) * 2, 0
            for site in sites:
                size = site.size(*cells)
                if (key := (site.channels, size)) not in saved:
                    spec = spec_for(site, train.operator, train.options_of_operator(), (64, 64))
                    saved[key] = attention_flops(site, size) - folded_flops(spec, size)
                gained += max(saved[key], 0)
            whole = unet_flops(unet, cells)
            return whole, whole - gained

        for side in sides:
            stages = [size[0] for size in sizes((side, side), own)]
            taken = [steps] + [int(steps * strength_at(stage / own, AUTO)) for stage in stages[1:]]
            plain = [2 * steps * one for one in step(side)]
            grown = [2 * sum(n * step(one)[k] for n, one in zip(taken, stages, strict=True)) for k in range(2)]
            figures = dict(zip(("plain", "plain, students", "grown", "grown, students"), plain + grown, strict=True))
            rows.append({"layout": layout, "px": side} | {name: f"{n / 1e15:.3g}" for name, n in figures.items()})
            print(rows[-1], flush=True)
    write("growing_operations", rows)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
