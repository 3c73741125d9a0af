"""Which token belongs to which cluster, decided alike in two precisions: rounding decides a tie, and a sum with one token
more is another sum. B batch, N heads, L tokens, M clusters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from safari import clusters


class Assignments:
    """Of one call in a precision, noted, to be followed by a reference in float64 on the first of its samples.

    They are followed where they are right but for rounding: where the cluster that was taken is no farther than the nearest
    one by more than `slack` of a token's mean square. Elsewhere the reference takes its own, and the error shows it.
    """

    def __init__(self, slack: float):
        self.slack = slack
        # of each of Lloyd's steps: (B, N, L) of some heads each, and how many heads have followed
        self.noted: dict[int, list[Tensor]] = defaultdict(list)
        self.followed: dict[int, int] = defaultdict(int)

    def noting(self) -> AbstractContextManager[None]:
        return self._instead(self._note)

    def following(self) -> AbstractContextManager[None]:
        return self._instead(self._follow)

    @contextmanager
    def _instead(self, decide: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Iterator[None]:
        nearest, step = clusters.nearest, 0

        def decided(x: Tensor, centers: Tensor) -> Tensor:
            nonlocal step
            step = 0 if centers.data_ptr() == x.data_ptr() else step + 1  # the first centers are the first tokens
            return decide(x, centers, nearest(x, centers), step)

        with patch.object(clusters, "nearest", decided):
            yield

    def _note(self, x: Tensor, centers: Tensor, labels: Tensor, step: int) -> Tensor:
        self.noted[step].append(labels)
        return labels

    def _follow(self, x: Tensor, centers: Tensor, labels: Tensor, step: int) -> Tensor:
        first = self.followed[step]
        self.followed[step] += x.shape[1]
        theirs = torch.cat(self.noted[step], dim=1)[:1, first : first + x.shape[1]]
        tie = _distance(x, centers, theirs) - _distance(x, centers, labels) <= self.slack * x.square().mean()
        return torch.where(tie, theirs, labels)


def _distance(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Mean square of x (B, N, L, E) less the centers (B, N, M, E) of their labels (B, N, L); (B, N, L)."""
    return (x - centers.gather(-2, labels[..., None].expand_as(x))).square().mean(dim=-1)
