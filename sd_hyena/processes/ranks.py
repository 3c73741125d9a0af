"""A run in several processes: rank 0 decides everything, then Lightning starts the others, which are told.

Lightning starts the command once more for each further device of a machine; what it inherits is the environment. The command
of a further machine (NODE_RANK above 0) is started by the user and asks the first one over the network, at the port
after MASTER_PORT.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from sd_hyena.errors import BadInput

TOLD = "SD_HYENA_RUN"
MEETING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")  # where machines meet, and which this one is
ARRIVAL = timedelta(minutes=30)  # within which all machines are started
_line: Any = None  # to the other machines, kept open while the run lasts


def rank() -> int:
    """0 in the only process, or the first of all; torchrun's number, or that of the machine plus that on the machine."""
    if TOLD not in os.environ:
        return int(os.environ.get("RANK", 0))
    return int(os.environ.get("NODE_RANK", 0)) + local_rank()


def local_rank() -> int:
    """Of this process on its machine: which of its GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", 0)) if TOLD in os.environ else 0


def meet(num_nodes: int) -> None:
    """Connect with the other machines of the run, if it has any; further ones wait until the first has decided.

    Raises BadInput.
    """
    global _line
    if TOLD in os.environ:
        return
    if num_nodes == 1:
        if os.environ.get("NODE_RANK", "0") != "0":
            raise BadInput(f"NODE_RANK={os.environ['NODE_RANK']} is set, but num_nodes=1; give --num_nodes or unset it")
        return
    missing = [name for name in MEETING if not os.environ.get(name)]
    if missing:
        raise BadInput(
            f"num_nodes={num_nodes} needs {', '.join(missing)} in the environment: the first machine's address, a free "
            f"port of it, and the number of this machine from 0"
        )
    from torch.distributed import TCPStore

    address, port, node = (os.environ[name] for name in MEETING)
    if not (port.isdecimal() and node.isdecimal() and int(node) < num_nodes):
        raise BadInput(f"MASTER_PORT={port} must be a number, NODE_RANK={node} one from 0 to {num_nodes - 1}")
    try:
        _line = TCPStore(address, int(port) + 1, is_master=node == "0", wait_for_workers=False, timeout=ARRIVAL)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"MASTER_ADDR={address}, port {int(port) + 1}: the machines do not meet ({reason})") from None
    if node != "0":
        try:
            _line.wait(["run"], timedelta(days=7))  # the first machine may draw its samples meanwhile
            os.environ[TOLD] = _line.get("run").decode()
        except RuntimeError:
            raise RuntimeError("the first machine has ended before the run began") from None


def tell(**decided: Any) -> None:
    """Leave what rank 0 decided for the other processes. Raises BadInput the second time."""
    if TOLD in os.environ:
        raise BadInput("a process can start one run on several devices; start the next one by itself")
    os.environ[TOLD] = json.dumps(decided)
    if _line is not None:
        _line.set("run", os.environ[TOLD])


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
    """Print at once, on rank 0 alone, without smearing a bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)), file=sys.stdout)
        sys.stdout.flush()
