"""From which size on a student is faster than the attention it stands in for: measured, once for each shape in a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from sd_hyena.cost.operations import attention_flops, folded_flops
from sd_hyena.cost.timing import interleaved
from sd_hyena.sites import Site
from sd_hyena.students.student import Projections, Size

ROUNDS = 3
LONG, CLEAR = 1.0, 2.0  # seconds and times: first calls that long and that far apart need no further round
SETTLED = 20.0  # times as many operations: attention, though its kernels work them off several times as fast, is slower
_measured: dict[tuple, float] = {}


@torch.no_grad()
def speedup(site: Site, attention: nn.Module, student: nn.Module, size: Size, batch: int) -> float:
    """How many times faster a site's student is than its attention on a grid (H, W); measured at the first asking.

    Both are given as they would be used, on their device. Sites of one shape share the measurement: machine, dtype,
    channels, heads, operator, its options, size, batch. Infinite where counted operations settle it.
    """
    p, spec = attention.to_q.weight, student.spec
    machine = torch.cuda.get_device_name(p.device) if p.is_cuda else (p.device.type, torch.get_num_threads())
    shape = spec.channels, attention.heads, spec.operator, repr(sorted(spec.options.items())), tuple(size), batch
    key = (machine, p.dtype, *shape)
    if key not in _measured:
        if attention_flops(site, size) > SETTLED * folded_flops(spec, size):
            _measured[key] = math.inf
            return math.inf
        x = torch.randn(batch, size[0] * size[1], spec.channels, device=p.device, dtype=p.dtype)
        calls = (lambda: attention(x), lambda: student(x, Projections.of(attention), size))
        times = interleaved(calls, 1, p.device)
        if max(times)[0] < LONG or max(times)[0] < CLEAR * min(times)[0]:
            times = interleaved(calls, ROUNDS, p.device)
        first, second = (sorted(each)[len(each) // 2] for each in times)
        _measured[key] = first / second
    return _measured[key]
