"""Clusters of tokens by k-means: which belong together, and what they are on average.

B batch, N heads, L tokens, E channels of a head, M clusters. Lloyd's iteration from a fixed choice of tokens, so that a picture
always gives the same clusters; assignments are one matrix product, averages one addition by index.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

DISTANCES = 2**19  # at a time: what a core has cache for
COLUMNS = 32


def spread(length: int, n: int, device: torch.device | None = None) -> Tensor:
    """The first n of all `length` positions in an order of which every beginning lies evenly among them.

    Steps of about a golden section of the whole (a Kronecker sequence), which follow no column of a grid.
    """
    return torch.arange(n, device=device) * _step(length) % length


@cache
def _step(length: int) -> int:
    """Near the golden section, without a common divisor, and as far from any simple fraction of the length as can be."""
    golden = round(length * (math.sqrt(5) - 1) / 2)
    near = [step for step in range(max(golden - 32, 1), golden + 33) if math.gcd(step, length) == 1]
    return min(near, key=lambda step: (max(_quotients(step, length)), abs(step - golden)))


def _quotients(a: int, b: int) -> Iterator[int]:
    """Of a/b as a continued fraction, which a large one makes simple."""
    while a:
        yield b // a
        a, b = b % a, a


def nearest(x: Tensor, centers: Tensor) -> Tensor:
    """Which of (B, N, M, E) lies nearest to each of (B, N, L, E); (B, N, L), one of equally near ones."""
    heads = x.shape[1]
    if x.device.type == "cpu":
        heads = max(1, DISTANCES // math.prod((x.shape[0], x.shape[2], centers.shape[2])))
    return torch.cat([_nearest(*some) for some in zip(x.split(heads, 1), centers.split(heads, 1), strict=True)], dim=1)


def _nearest(x: Tensor, centers: Tensor) -> Tensor:
    half = 0.5 * centers.square().sum(dim=-1)[..., None, :]
    return _greatest((x @ centers.mT).sub_(half))


def _greatest(t: Tensor) -> Tensor:
    """Where (..., M) is greatest; (...).

    A processor finds a maximum many numbers at a time and its place one after the other: so first in which column of
    COLUMNS it lies, then in which row of that.
    """
    m = t.shape[-1]
    if t.device.type != "cpu" or m % COLUMNS or m <= 2 * COLUMNS:
        return t.max(dim=-1).indices
    rows = t.unflatten(-1, (-1, COLUMNS))
    column = rows.amax(dim=-2).max(dim=-1, keepdim=True).indices
    of_column = rows.gather(-1, column[..., None].expand(*rows.shape[:-1], 1)).squeeze(-1)
    return of_column.max(dim=-1).indices * COLUMNS + column.squeeze(-1)


def sizes(labels: Tensor, m: int) -> Tensor:
    """How many of (B, N, L) are in each of m clusters; (B, N, M, 1)."""
    one = torch.ones((*labels.shape, 1), device=labels.device)
    return _sums(one, labels, m)


def averages(x: Tensor, labels: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of (B, N, L, E) over each of M clusters; (B, N, M, E), and where one is empty what `otherwise` holds."""
    m = otherwise.shape[-2]
    count = sizes(labels, m).to(x)
    return torch.where(count > 0, _sums(x, labels, m) / count.clamp(min=1), otherwise)


def _sums(x: Tensor, labels: Tensor, m: int) -> Tensor:
    b, n, _, e = x.shape
    first = torch.arange(0, b * n * m, m, device=x.device).view(b, n, 1)
    return x.new_zeros(b * n * m, e).index_add(0, (labels + first).flatten(), x.reshape(-1, e)).view(b, n, m, e)


def lloyd(x: Tensor, m: int, steps: int) -> Tensor:
    """Labels (B, N, L) of x (B, N, L, E) after so many assignments to M >= 1 clusters, which start from its first M tokens.

    Without gradient: which token belongs where is no smooth matter.
    """
    with torch.no_grad():
        centers = x[..., :m, :]
        labels = nearest(x, centers)
        for _ in range(steps - 1):
            centers = averages(x, labels, centers)
            labels = nearest(x, centers)
    return labels
