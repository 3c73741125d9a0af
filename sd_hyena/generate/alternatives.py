"""The students of `-y a,b+c`: alternatives, each of one or several files that are swapped in together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from sd_hyena.cost.crossover import speedup
from sd_hyena.cost.landmark_count import cheaper, count_for
from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.landmarks import COUNT, Landmarks
from sd_hyena.sites import find_sites, select
from sd_hyena.students.checkpoint import StudentFile, load_students
from sd_hyena.students.untrained import untrained


@dataclass(frozen=True)
class Alternative:
    """One entry of `-y a,b`: the students that are swapped in together by site, and the files that they are from, or how
    many landmarks they have.

    `kept` are the short names of sites that have a student and keep their attention.
    """

    students: dict[str, nn.Module]
    entry: str = ""
    files: dict[str, str] = field(default_factory=dict)
    teacher_sha256: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: each student's site and file."""
        return ", ".join(f"{student.spec.short}:{self.files[site]}" for site, student in self.students.items())

    @property
    def serves_any_size(self) -> bool:
        """Whether its students may be put to work on tiles too."""
        return all(student.spec.size is None for student in self.students.values())


def _entries(files: str) -> dict[str, list[str]]:
    """The files of each alternative of `a,b+c`, where `+` uses several at once."""
    return {"+".join(names): names for names in given_path.alternatives(files)}


def files_of(files: str) -> list[str]:
    """Each file that the alternatives name, once."""
    return list(dict.fromkeys(name for names in _entries(files).values() for name in names))


def students_of(
    entry: str, unet: nn.Module, tile: tuple[int, int] | None = None, target: str = "IN01", like: Tensor | None = None
) -> StudentFile:
    """What one entry of `-y` names: a file, or `landmarks`. These have by default as many of a head as still make a site
    cheaper where the UNet meets `tile`, (H, W) in latent cells, by default its own size, and without a choice of sites are
    at all that they make cheaper there. Raises BadInput."""
    landmarks = Landmarks.read(entry)
    if landmarks is None:
        return load_students(entry, unet, target, like)
    tile = tile or (unet.config.sample_size,) * 2
    found = {}
    for site in select(find_sites(unet), landmarks.sites or "all"):
        size = site.size(*tile)
        count = landmarks.count or count_for(site, size) or COUNT
        if landmarks.sites or cheaper(site, size, count):
            found.update(untrained(unet, [site], count).students)
    return StudentFile(found)


def load_alternatives(
    files: str, unet: nn.Module, target: str = "IN01", tile: tuple[int, int] | None = None
) -> list[Alternative]:
    """The alternatives of `a,b+c`, where `+` uses several files at once. Raises BadInput."""
    return joined_students(files, {name: students_of(name, unet, tile, target) for name in files_of(files)})


def joined_students(files: str, loaded: Mapping[str, StudentFile]) -> list[Alternative]:
    """The same of files that are loaded, by name. Raises BadInput."""
    result = []
    for entry, names in _entries(files).items():
        together, stems, hashes = {}, {}, []
        for name in names:
            file = loaded[name]
            for site, student in file.students.items():
                if site in together:
                    raise BadInput(
                        f"hyena={entry!r} gives {student.spec.short} twice; separate alternatives with a comma"
                    )
                landmarks = Landmarks.read(name)
                stem = landmarks.named(student.spec.options["landmarks"]) if landmarks else Path(name).stem
                together[site], stems[site] = student, stem
            hashes.append(file.training.get("teacher_sha256", ""))
        result.append(Alternative(together, entry, stems, tuple(hashes)))
    return result


def check_target(target: str, loaded: Mapping[str, StudentFile]) -> None:
    """Raise BadInput for a site beside files that name their own, none of which it is."""
    own = {student.spec.short for file in loaded.values() for student in file.students.values()}
    asked = target != GenerateConfig.target and target.upper() not in own
    if asked and loaded and all(file.names_its_sites for file in loaded.values()):
        raise BadInput(
            f"target={target!r}: the files say which sites their students are of ({', '.join(sorted(own))}); "
            "leave -t away, it is for files that do not"
        )


def keep_attention(
    alternative: Alternative, unet: nn.Module, wanted: str, tile: tuple[int, int], batch: int
) -> Alternative:
    """The alternative without the students of the sites that `wanted` names; of `auto`, those where attention is faster.

    tile: (H, W) in latent cells that the UNet meets, batch: its samples. Says what stays. Raises BadInput.
    """
    sites = {site.name: site for site in find_sites(unet)}
    if wanted != "auto":
        chosen = {site.name for site in select(list(sites.values()), wanted)} if wanted else set()
    else:
        chosen = set()
        for name, student in alternative.students.items():
            size = sites[name].size(*tile)
            times = speedup(sites[name], unet.get_submodule(name), student, size, batch)
            if times <= 1:
                chosen.add(name)
                print(
                    f"{student.spec.short} keeps its attention, {1 / times:.2f} times faster at {size[1]}x{size[0]} tokens"
                )
    staying = {name: student for name, student in alternative.students.items() if name not in chosen}
    kept = tuple(student.spec.short for name, student in alternative.students.items() if name in chosen)
    return replace(alternative, students=staying, kept=kept)


MEASURED = "auto:"  # what `auto` once found, a stage's sites behind each `;`


def kept_in(wanted: str, stages: int) -> list[str]:
    """What `keep_attention` says for each stage of a picture: one for all, or one for each behind a `;`; what was measured
    for another number of stages is measured again. Raises BadInput."""
    parts = wanted.removeprefix(MEASURED).split(";")
    if wanted.startswith(MEASURED) and len(parts) != stages:
        return ["auto"] * stages
    if len(parts) not in (1, stages):
        raise BadInput(
            f"keep_attention={wanted!r} is for {len(parts)} stages, this picture has {stages}; name sites for all, or auto"
        )
    return parts if len(parts) > 1 else parts * stages


def said_of_kept(wanted: str, kept: Sequence[Sequence[str]]) -> str:
    """What `keep_attention` is in a picture each of whose stages kept these sites: it repeats the picture bit for bit."""
    said = ";".join(map(",".join, kept))
    if wanted == "auto" or wanted.startswith(MEASURED):
        return MEASURED + said
    return said if said.strip(";") else ""


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
