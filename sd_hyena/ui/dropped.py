"""What a dropped picture fills the form with, and what of it could not be taken."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sd_hyena.errors import BadInput
from sd_hyena.options import from_image, named_files
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.ui.region_editor import value_of
from sd_hyena.ui.session import Session


@dataclass(frozen=True)
class Dropped:
    """Options, the value of the editor of regions, the program that wrote it, and lines about the rest."""

    options: dict[str, Any]
    regions: str
    program: str
    left: list[str]


def dropped(path: str, session: Session) -> Dropped | None:
    """None for a picture that says nothing."""
    own = session.own
    try:
        found = from_image.read(path)
    except BadInput as error:
        if "holds no options" in str(error):
            return None
        return Dropped({}, "[]", "", [str(error).partition(" ")[2] or str(error)])
    defaults = {f.name: f.default for f in dataclasses.fields(GenerateConfig)} | own
    untouched = defaults | found.options | found.beside
    chosen, lost = dict(untouched), []
    try:
        chosen |= named_files.of_picture(found, chosen, untouched)
    except BadInput as error:
        lost.append(str(error))
    left = [text for text, option in found.left if not option or chosen[option] == untouched[option]]
    left = [line for line in left if not line.startswith(("the picture that it was drawn from", "noise inversion of"))]
    regions = "[]"
    if chosen.get("regions"):
        from sd_hyena.large.regions import read_regions

        try:
            regions, lines = session.regions_of(value_of(read_regions(chosen["regions"])))
            lost += lines
        except BadInput as error:
            lost.append(str(error).replace(path, "the picture"))
    taken = {name: value for name, value in chosen.items() if value != defaults[name] or name in found.options}
    for name in (*own, "regions", "from_image", "init_image", "mask", "control_image"):
        taken.pop(name, None)
    return Dropped(taken, regions, found.program, [*found.notes, *left, *lost])
