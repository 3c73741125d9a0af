"""Mixing some heads at a time: what lies between the projections is independent from head to head.

B batch, L tokens, D channels, C channels of a group of heads. Between projections and answer everything is (B, L, C), or (B, C, L) where
channels come first, and only a group's temporaries live at once: a processor finds them in its cache, and the peak of a block
hardly grows with the number of heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

Mix = Callable[[Tensor, Tensor, Tensor, slice], Tensor]  # q, k, v of some heads, which -> the same shape
SMALLEST_GROUP = 2**21  # numbers in a stream of a group: a smaller one takes longer to be started than to run
SMALLEST_OF_PLANES = {"cpu": 2**19}  # what a core has cache for, beside all that a convolution needs
NARROWEST = 64  # channels of a group without planes: a product of fewer rows is slow


class ProjectedStreams(Sequence):
    """The streams `x weight_iᵀ + bias_i` of tokens x (B, L, D), computed when somebody asks for them.

    A sequence of (B, L, D), like the tuple of streams that it stands for; weight (N, D, D), bias (N, D) or none, which
    saves filling the streams with it first.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None):
        self.x, self.weight, self.bias = x, weight, bias

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, i: int) -> Tensor:
        return torch.nn.functional.linear(self.x, self.weight[i], None if self.bias is None else self.bias[i])

    def channels(self, part: slice) -> tuple[Tensor, ...]:
        """(B, C, L) each, in one matrix product."""
        weight, bias = self._some(part)
        weights, x = weight.expand(len(self.x), -1, -1), self.x.mT
        product = torch.bmm(weights, x) if bias is None else torch.baddbmm(bias[:, None], weights, x)
        return product.chunk(len(self), dim=1)

    def tokens(self, part: slice) -> tuple[Tensor, ...]:
        """(B, L, C) each, in one matrix product."""
        return torch.nn.functional.linear(self.x, *self._some(part)).chunk(len(self), dim=-1)

    def _some(self, part: slice) -> tuple[Tensor, Tensor | None]:
        return self.weight[:, part].flatten(0, 1), None if self.bias is None else self.bias[:, part].flatten()


def mix_in_head_groups(
    mix: Mix, streams: Sequence[Tensor], heads: int, at_once: int = 0, tokens_first: bool = False, beside: int = 0
) -> Tensor:
    """The answers of `mix(q, k, v, channels)` put together to (B, L, D), of `at_once` heads each.

    `streams` as a mixer gets them, `channels` a slice of D. By default as many heads at once as this device likes, each of
    which needs `beside` numbers besides its streams. With `tokens_first` the mixing takes and gives (B, L, C).
    """
    x = streams.x if isinstance(streams, ProjectedStreams) else streams[0]
    at_once = at_once or heads_at_once(heads, x, planes=not tokens_first, beside=beside)
    parts = list(_parts(x.shape[-1], heads, at_once))
    dim = 2 if tokens_first else 1
    if isinstance(streams, ProjectedStreams):
        groups = map(streams.tokens if tokens_first else streams.channels, parts)
    else:  # split, not sliced: a slice's gradient is as large as the whole
        whole = streams if tokens_first else [t.mT for t in streams]
        groups = zip(*(t.split([p.stop - p.start for p in parts], dim=dim) for t in whole), strict=True)
    groups = iter(groups)
    answers = (mix(*next(groups), part) for part in parts)  # nothing here holds on to a group that is done
    y = torch.cat(list(answers), dim=dim) if torch.is_grad_enabled() else _in_place(answers, parts, x, dim)
    return y if tokens_first else y.mT


def head_by_head(attend: Mix, width: int) -> Mix:
    """The mixing of (B, L, C) that heads of so many channels do by `attend`, which takes and gives (B, heads, L, width)."""

    def mix(q: Tensor, k: Tensor, v: Tensor, channels: slice) -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
        return attend(q, k, v, channels).transpose(1, 2).flatten(2)

    return mix


def _in_place(answers: Iterator[Tensor], parts: Sequence[slice], x: Tensor, dim: int) -> Tensor:
    """Answers of channels, which lie in `dim`, each put where it belongs at once and not kept."""
    if len(parts) == 1:
        return next(answers)
    y = None
    for part in parts:
        answer = next(answers)
        if y is None:
            shape = list(answer.shape)
            shape[dim] = x.shape[-1]
            y = answer.new_empty(shape)
        y.narrow(dim, part.start, part.stop - part.start).copy_(answer)
        del answer
    return y


def heads_at_once(heads: int, x: Tensor, planes: bool, beside: int = 0) -> int:
    """How many heads of tokens x (B, L, D) to mix at once, as channels of tokens or as planes of a grid."""
    smallest = SMALLEST_OF_PLANES.get(x.device.type, SMALLEST_GROUP) if planes else SMALLEST_GROUP
    numbers = x.numel() + heads * len(x) * beside
    groups, narrowest = min(heads, -(-numbers // smallest)), 1 if planes else NARROWEST
    return max(-(-heads // groups), min(heads, -(-narrowest * heads // x.shape[-1])))


def _parts(d_model: int, heads: int, at_once: int) -> Iterator[slice]:
    width = d_model // heads * at_once
    for start in range(0, d_model, width):
        yield slice(start, min(start + width, d_model))
