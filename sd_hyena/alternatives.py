"""The students of `-y a,b+c`: alternatives, each of one or several files that are swapped in together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sd_hyena.checkpoint import load_students
from sd_hyena.errors import BadInput
from sd_hyena.sites import find_sites
from sd_hyena.student import cast


@dataclass(frozen=True)
class Alternative:
    """One entry of `-y a,b`: the students that are swapped in together, and how to name them."""

    students: dict[str, nn.Module]
    entry: str = ""
    label: str = ""
    teacher_sha256: tuple[str, ...] = ()

    @property
    def serves_any_size(self) -> bool:
        """Whether its students may be put to work on tiles too."""
        return all(student.spec.size is None for student in self.students.values())


def load_alternatives(files: str, unet: nn.Module, target: str = "IN01") -> list[Alternative]:
    """The alternatives of `a,b+c`, where `+` uses several files at once. Raises BadInput."""
    result = []
    for entry in filter(None, (part.strip() for part in files.split(","))):
        together, labels, hashes = {}, [], []
        for name in filter(None, (part.strip() for part in entry.split("+"))):
            file = load_students(name, unet, target)
            for site, student in file.students.items():
                if site in together:
                    raise BadInput(
                        f"hyena={entry!r} gives {student.spec.short} twice; separate alternatives with a comma"
                    )
                together[site] = cast(student, next(unet.parameters())).eval()
                labels.append(f"{student.spec.short}:{Path(name).stem}")
            hashes.append(file.training.get("teacher_sha256", ""))
        result.append(Alternative(together, entry, ", ".join(labels), tuple(hashes)))
    return result


def check_sizes(alternative: Alternative, unet: nn.Module, tile: tuple[int, int]) -> None:
    """Raise BadInput for a student that does not serve what the UNet meets: `tile`, (H, W) in latent cells."""
    sites = {site.name: site for site in find_sites(unet)}
    for name, student in alternative.students.items():
        if not student.spec.serves(sites[name].size(*tile)):
            h, w = (cells * 8 * 2 ** sites[name].level for cells in student.spec.size)
            raise BadInput(
                f"{student.spec.short} was trained at {w}x{h} and its 1-D filter serves that size only, not "
                f"{8 * tile[1]}x{8 * tile[0]}; generate with -W {w} -H {h} or in tiles of {w // 8}x{h // 8}, "
                "or train at this size"
            )
