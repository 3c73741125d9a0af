"""What a picture sets the form to, and what of it could not be taken."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import from_image, named_files
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.ui.region_editor import value_of
from sd_hyena.ui.session import Session

BESIDE_IT = ("noise inversion of", "the picture that it was drawn from")  # of A1111: what is left unless there is one


@dataclass(frozen=True)
class Dropped:
    """Every option of a form as --from would have it, but for the machine's own; the value of the editor of regions; the
    program that wrote it; and lines about the rest. Nothing that could be read: no options, and None for the regions."""

    options: dict[str, Any]
    regions: str | None
    program: str
    left: list[str]


def dropped(path: str, session: Session, starting: bool = False) -> Dropped | None:
    """None for a picture that says nothing. `starting`: it is to be drawn again, so that it is its own init_image."""
    own = session.own
    try:
        found = from_image.read(path)
    except BadInput as error:
        if "holds no options" in str(error):
            return None
        return Dropped({}, None, "", [str(error).partition(" ")[2] or str(error)])
    defaults = {f.name: f.default for f in dataclasses.fields(GenerateConfig)} | own
    untouched = defaults | found.options | (found.beside if starting or found.options.get("init_image") else {})
    chosen, lost = dict(untouched), []
    try:
        chosen |= named_files.of_picture(found, chosen, untouched)
    except BadInput as error:
        lost.append(str(error))
    left = [text for text, option in found.left if not option or chosen[option] == untouched[option]]
    left = [line for line in left if not (starting and line.startswith(BESIDE_IT))]
    regions = "[]"
    if chosen.get("regions"):
        from sd_hyena.large.regions import read_regions

        try:
            regions, lines = session.regions_of(value_of(read_regions(chosen["regions"])))
            lost += lines
        except BadInput as error:
            lost.append(str(error).replace(path, "the picture"))
    if chosen["mask"]:
        lost.append("mask: where it was drawn anew is not in the picture; paint it")
    for name in (*own, *from_image.OURS_ALONE, "regions", "mask", "device"):
        chosen.pop(name, None)
    if starting:
        chosen.pop("init_image")
    return Dropped(chosen, regions, found.program, [*found.notes, *left, *lost])
