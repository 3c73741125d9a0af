"""`landmarks` in place of a file of students: attention by way of the picture's own clusters, without any training."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sd_hyena.errors import BadInput

WORD = "landmarks"
COUNT = 256  # of a head, where nothing else decides; docs/operator.md has what fewer and more are worth
MOST = 65536


@dataclass(frozen=True)
class Landmarks:
    """How many a head has, by the size of the picture if nobody says, and the sites that are seen through them: a
    selection, or all where that is cheaper."""

    count: int | None = None
    sites: str = ""

    @classmethod
    def read(cls, entry: str) -> Landmarks | None:
        """What `landmarks`, `landmarks:128`, `landmarks:level0`, `landmarks:128:IN01:OUT*` ask for.

        None for anything else, a file of such a name included. Raises BadInput.
        """
        word, *parts = (part.strip() for part in entry.split(":"))
        if word != WORD or os.path.exists(entry):
            return None
        counts = [part for part in parts if part.lstrip("+-").isdecimal()]
        if len(counts) > 1 or not all(parts) or (counts and not 1 <= int(counts[0]) <= MOST):
            raise BadInput(
                f"hyena={entry!r} must be {WORD}, {WORD}:COUNT, {WORD}:SITES or {WORD}:COUNT:SITES, "
                f"COUNT from 1 to {MOST}, e.g. {WORD}:256:level0"
            )
        return cls(int(counts[0]) if counts else None, ",".join(part for part in parts if part not in counts))

    def named(self, count: int) -> str:
        """The entry that asks for so many at these sites, whatever the size."""
        return ":".join([WORD, str(count), *self.sites.split(",")]).rstrip(":")
