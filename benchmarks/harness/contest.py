"""Methods at one shape: each is checked, then all are timed together and their memory is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness.assignments import Assignments
from benchmarks.harness.gate import TOLERANCE, relative_error, verdict
from benchmarks.harness.methods import ATTENTION, Method
from benchmarks.harness.peak import gpu_peaks
from benchmarks.harness.rounds import TWIN, compare
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings
from sd_hyena.processes.memory import is_out_of_memory, release

CHECKED_ROWS = 64  # of the tokens, against the float64 reference
SHIFT = 10.0  # mean of the inputs that find what overflows
BOTH_INPUTS = 4096  # tokens up to which zero-mean inputs are checked too
EFFICIENCY = 0.3  # of the matrix product's rate, for telling how long something would take
LAUNCH_BOUND = 1e-3  # seconds below which a GPU is timed from a CUDA graph too


@torch.no_grad()
def error_of(method: Method, x: Tensor) -> float:
    """The largest error on `x`, and on `x` shifted by its mean, over some rows; infinite for NaN anywhere."""
    rows = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))[:CHECKED_ROWS].to(x.device)
    worst = 0.0
    for given in (x + SHIFT, x) if x.shape[1] <= BOTH_INPUTS else (x + SHIFT,):
        assignments = Assignments(TOLERANCE[x.dtype])
        with assignments.noting():
            y = method.call(given)
        if not bool(torch.isfinite(y).all()):
            return math.inf
        with assignments.following():
            reference = method.reference(given[:1].double(), rows)
        worst = max(worst, relative_error(y[:1, rows], reference))
    return worst


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """The same GPU work without its launches, replayed from a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # plans and workspaces of the FFT exist before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


@torch.no_grad()
def contest(
    methods: Iterable[Method],
    x: Tensor,
    blank: Row,
    ceilings: Ceilings,
    bytes_: float,
    budget: float,
    longest: float,
    against: str = ATTENTION,
) -> Iterator[Row]:
    """Rows for every method on tokens `x` (B, L, D), `blank` filled in.

    bytes_: what has to be moved at least. budget: seconds for all. longest: seconds a method may take once.
    """
    calls, rows = {}, []
    for method in methods:
        row = replace(blank, method=method.name, batch=len(x), tokens=x.shape[1])
        row = replace(row, gflop=method.operations * len(x) / 1e9)
        expected = method.operations * len(x) / (EFFICIENCY * ceilings.matmul)
        if expected > longest:
            rows.append(replace(row, status=f"skipped: about {expected:.0f} s a call"))
            continue
        try:
            error = error_of(method, x)
            call = lambda method=method: method.call(x)
            row = replace(row, error=error if math.isfinite(error) else None, status=verdict(error, x.dtype))
            if row.status == "ok" and row.setting.on_gpu:
                allocated, reserved = gpu_peaks(call, x.device)
                row = replace(row, allocated=allocated, reserved=reserved)
        except (RuntimeError, torch.OutOfMemoryError) as failure:
            said = "out of memory" if is_out_of_memory(failure) else " ".join(str(failure).split())[:80]
            row = replace(row, status=f"failed: {said}")
            release()
        rows.append(row)
        if row.status == "ok":
            calls[method.name] = call
            if x.is_cuda and expected < LAUNCH_BOUND:
                replayed = replace(row, method=f"{method.name}, graph", note="replayed from a CUDA graph")
                try:
                    calls[replayed.method] = graphed(call)
                except RuntimeError as failure:  # something in it cannot be recorded
                    replayed = replace(replayed, status=f"failed: {' '.join(str(failure).split())[:80]}")
                rows.append(replayed)
    baseline = against if against in calls else next(iter(calls), None)
    compared = compare(calls, baseline, blank.setting, budget) if calls else {}
    if baseline is not None:
        twin = next(row for row in rows if row.method == baseline)
        rows.append(replace(twin, method=f"{baseline}, {TWIN}", note="the same again: what it differs by is noise"))
        compared[rows[-1].method] = compared[TWIN]
    for row in rows:
        timed = compared.get(row.method)
        if timed is not None and baseline != against:
            row = replace(row, note=f"against {baseline}: {against} has no time")
        roof = ceilings.seconds(row.gflop * 1e9, bytes_)
        yield replace(row, compared=timed, roofline=timed and roof / timed.seconds.median)
