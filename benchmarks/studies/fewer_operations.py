"""python -m benchmarks.studies.fewer_operations [STUDENTS ...]: how many times fewer operations the sites of students take.

Of all self-attentions of the shipped model together, one sample, as generation computes them. Counted, nothing is drawn.
"""

from __future__ import annotations

import sys

import torch

from sd_hyena.cost.operations import attention_flops, folded_flops
from sd_hyena.generate.alternatives import students_of
from sd_hyena.models.hollow import hollow_network
from sd_hyena.options import given_path
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.sites import find_sites

SIZES = (256, 512, 1024, 2048)  # px
STUDENTS = ("all", "level0", "landmarks:256:all", "landmarks")


def main(entries: list[str]) -> None:
    unet = hollow_network(SHIPPED_MODEL, "unet")
    print(f"| students | {' | '.join(f'{side} px' for side in SIZES)} |")
    for entry in entries or STUDENTS:
        shown = []
        for side in SIZES:
            cells = (side // 8, side // 8)
            students = {}
            for name in given_path.alternatives(given_path.located(entry, "students", "", "students"))[0]:
                students |= students_of(name, unet, cells, like=torch.empty(0)).students
            before = after = 0
            for site in find_sites(unet):
                attention = attention_flops(site, site.size(*cells))
                before, student = before + attention, students.get(site.name)
                after += folded_flops(student.spec, site.size(*cells)) if student else attention
            shown.append(f"{before / after:.2f}")
        print(f"| `{entry}` | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
