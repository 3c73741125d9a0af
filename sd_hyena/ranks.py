"""A run in several processes: rank 0 decides everything, then Lightning starts the others, which are told.

Lightning starts the command once more for each further rank; what it inherits is the environment.
"""

from __future__ import annotations

import json
import os
from typing import Any

from sd_hyena.errors import BadInput

TOLD = "SD_HYENA_RUN"


def rank() -> int:
    """Of this process, 0 where there is only one."""
    return int(os.environ.get("LOCAL_RANK" if TOLD in os.environ else "RANK", 0))


def tell(**decided: Any) -> None:
    """Leave what rank 0 decided for the processes that Lightning is about to start. Raises BadInput the second time."""
    if TOLD in os.environ:
        raise BadInput("a process can start one run on several devices; start the next one by itself")
    os.environ[TOLD] = json.dumps(decided)


def told() -> dict[str, Any]:
    """What rank 0 decided."""
    return json.loads(os.environ[TOLD])


def check_launched_by_us() -> None:
    """Raises BadInput in a process that another launcher numbered: its ranks could not agree on a run."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and TOLD not in os.environ:
        raise BadInput(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, so another launcher started this; "
            f"run python train.py --devices N by itself"
        )


def say(*text: Any) -> None:
    """Print, on rank 0 alone."""
    if rank() == 0:
        print(*text)
