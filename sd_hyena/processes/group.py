"""Processes that torchrun started for one command: they share its images, or the tiles of one image.

    torchrun --nproc_per_node 2 generate.py ...

torchrun tells each by the environment who it is, and ends all when one fails. They speak with one voice: process 0 prints,
and of a failure the first that meets it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from sd_hyena.processes.ranks import TOLD

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
_AT_WORK = ContextVar("at_work", default=False)  # whether this process does a piece of what all of them share
PATIENCE = timedelta(days=7)  # with each other's images; one that died is noticed at once


class ProcessFailed(RuntimeError):
    """Something failed in one process, which all of them know by now; or a process is there no more."""


class NotFinite(ProcessFailed, FloatingPointError):
    """What failed in one process was that its numbers are not finite."""


@dataclass(frozen=True)
class Group:
    """`size` processes, of which this one is number `rank`; one alone needs no torch.distributed."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"  # where tensors have to lie to be exchanged

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in each of them. Raises ProcessFailed."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with _lost():
            dist.all_gather_object(values, value)
        return values

    def agreed(self, value: T) -> T:
        """The value of process 0, in each. Raises ProcessFailed."""
        return self.gathered(value)[0]

    def tried(self, do: Callable[[], T]) -> T:
        """`do()`; where it fails in one process it fails in all, and all know of it, so that they can go on together.

        One alone raises what `do` raises, several ProcessFailed ("out of memory" in its message if that was it) or NotFinite.
        """
        result = failure = None
        try:
            result = do()
        except ProcessFailed:
            raise
        except (RuntimeError, FloatingPointError) as error:
            failure = error
        if self.size == 1:
            if failure is not None:
                raise failure
            return result
        for rank, told in enumerate(self.gathered(_told(failure))):
            if told is not None:
                kind, line = told
                raise (NotFinite if kind == "not finite" else ProcessFailed)(f"process {rank}: {line}") from failure
        return result

    def map(self, do: Callable[[T], Tensor], work: Sequence[T]) -> Iterator[Tensor]:
        """As the built-in `map`, but the processes take turns, and each gets all results, in float32. Raises as `tried`.

        What is mapped within a piece of work is that process's own.
        """
        if self.size == 1 or _AT_WORK.get():
            yield from map(do, work)
            return
        import torch
        import torch.distributed as dist

        def turn(mine: Sequence[T]) -> Tensor | None:
            before = _AT_WORK.set(True)
            try:
                return do(mine[0]).to(self.device, torch.float32).contiguous() if mine else None
            finally:
                _AT_WORK.reset(before)

        def room(own: Tensor | None, shapes: Sequence[Any]) -> list[Tensor]:
            return [own if i == self.rank else torch.empty(shape, device=self.device) for i, shape in enumerate(shapes)]

        for first in range(0, len(work), self.size):
            own = self.tried(partial(turn, work[first : first + self.size][self.rank :][:1]))
            shapes = self.gathered(None if own is None else own.shape)[: len(work) - first]
            results = self.tried(partial(room, own, shapes))
            for rank, result in enumerate(results):
                with _lost():
                    dist.broadcast(result, rank)
            yield from results


@contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the connection to one of them is closed
        raise ProcessFailed("another process of this run has ended") from error


def _told(failure: Exception | None) -> tuple[str, str] | None:
    from sd_hyena.processes.memory import is_out_of_memory

    if failure is None:
        return None
    if is_out_of_memory(failure):
        return "out of memory", "out of memory"
    return "not finite" if isinstance(failure, FloatingPointError) else "failed", f"{type(failure).__name__}: {failure}"


def launched() -> bool:
    """Whether torchrun, or somebody who numbers processes as it does, started this one among others."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ


def own_device(name: str) -> str:
    """The name of the device for this process: of several GPUs its own."""
    if not launched() or name not in ("auto", "cuda"):
        return name
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else name


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """Within the block, the processes can speak with each other; one that was started alone is a group of one."""
    if not launched():
        yield Group()
        return
    import torch
    import torch.distributed as dist

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    with _lost():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield Group(dist.get_rank(), dist.get_world_size(), device if on_gpu else "cpu")
    dist.destroy_process_group()  # not after a failure: NCCL would wait for the others


def may_speak() -> bool:
    """Whether no other process of a run has said why they end; from now on one has."""
    where = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (launched() or TOLD in os.environ) or None in where:
        return True
    from torch.distributed import TCPStore

    try:  # the store by which they found each other
        store = TCPStore(where[0], int(where[1]), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
        return store.add(f"sd_hyena/ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError):  # nobody is left to ask
        return True
