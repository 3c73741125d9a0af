"""The long convolutions alone, of 320 channels: as the published operator does it, over the plane, and separable."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness.contest import contest
from benchmarks.harness.methods import Method
from benchmarks.harness.row import Row
from benchmarks.harness.setting import Ceilings, Setting
from benchmarks.suites.block import sides
from safari.fftconv import long_conv, long_conv2d
from safari.toeplitz import separable_conv2d
from sd_hyena.cost.operations import flops

CHANNELS, REACH = 320, 64  # of IN01; cells
PUBLISHED = "1-D causal"


def _direct_1d(h: Tensor, first_lag: int, u: Tensor, rows: Tensor) -> Tensor:
    """The sum itself at some places, in float64."""
    result, places = [], torch.arange(u.shape[1], device=u.device)
    for row in rows.tolist():
        lags = row - places - first_lag
        taps = h.double()[:, lags.clamp(0, h.shape[-1] - 1)] * ((lags >= 0) & (lags < h.shape[-1]))
        result.append(torch.einsum("dl,bld->bd", taps, u))
    return torch.stack(result, dim=1)


def _direct_2d(filter_at, size: tuple[int, int], u: Tensor, rows: Tensor) -> Tensor:
    """The same on a grid; `filter_at` gives the filter (D, ...) at offsets down and along."""
    down, along = (torch.arange(n, device=u.device) for n in size)
    result = []
    for row in rows.tolist():
        y, x = divmod(row, size[1])
        taps = filter_at(y - down, x - along)
        result.append(torch.einsum("dhw,bhwd->bd", taps, u.unflatten(1, size)))
    return torch.stack(result, dim=1)


def _centred(h: Tensor, offsets: Tensor) -> Tensor:
    """A centred filter (..., 2 r + 1) at offsets, zero beyond its reach."""
    reach = h.shape[-1] // 2
    return h.double()[..., (offsets + reach).clamp(0, 2 * reach)] * (offsets.abs() <= reach)


def methods(size: tuple[int, int], setting: Setting) -> Iterator[Method]:
    length, given = size[0] * size[1], {"device": setting.device}
    source = torch.Generator(setting.device).manual_seed(3)
    noise = lambda *shape: torch.randn(*shape, generator=source, **given) / shape[-1] ** 0.5
    grid = lambda u: u.mT.unflatten(-1, size)
    tokens = lambda u: u.flatten(2).mT

    def made(name, call, reference) -> Method:
        u = torch.zeros(1, length, CHANNELS, dtype=setting.dtype, **given)
        return Method(name, call, reference, flops(lambda: call(u)))

    for name, lag, taps in ((PUBLISHED, 0, length), ("1-D bidirectional", 1 - length, 2 * length - 1)):
        h = noise(CHANNELS, taps)
        yield made(name, lambda u, h=h, lag=lag: long_conv(u.mT, h, lag).mT, partial(_direct_1d, h, lag))
    down, along = (min(REACH, n - 1) for n in size)
    full = noise(CHANNELS, 2 * down + 1, 2 * along + 1)
    at = lambda y, x: _centred(_centred(full, x).mT, y).mT
    yield made("2-D full", lambda u: tokens(long_conv2d(grid(u), full)), partial(_direct_2d, at, size))
    for rank in (1, 4, 8):
        a, b = noise(CHANNELS, rank, 2 * down + 1), noise(CHANNELS, rank, 2 * along + 1)
        at = lambda y, x, a=a, b=b: torch.einsum("drh,drw->dhw", _centred(a, y), _centred(b, x))
        call = lambda u, a=a, b=b: tokens(separable_conv2d(grid(u), a, b))
        yield made(f"2-D separable, rank {rank}", call, partial(_direct_2d, at, size))


def rows(setting: Setting, ceilings: Ceilings) -> Iterator[Row]:
    """Every convolution at every size; ratios are against the causal one, the published operator's."""
    for side in sides(setting):
        size = (side // 8, side // 8)
        source = torch.Generator(setting.device).manual_seed(0)
        given = {"device": setting.device, "dtype": setting.dtype, "generator": source}
        x = torch.randn(2 if setting.on_gpu else 1, size[0] * size[1], CHANNELS, **given)
        blank = Row(setting, "core", (side, side), "", site=f"{CHANNELS} channels")
        least = 2 * x.numel() * x.element_size()
        budget = 3.0 if setting.quick else 20.0
        yield from contest(methods(size, setting), x, blank, ceilings, least, budget, 12.0, against=PUBLISHED)
