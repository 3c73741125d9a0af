"""A student: the trained module that stands in for a site's self-attention.

B batch, L tokens, D channels, (H, W) the site's true size with H * W = L.
A student reuses the site's own projections, whatever a fine-tune or a LoRA made of them, and adds its change to each:

    streams = to_q(x) + dq(x), to_k(x) + dk(x), ..., to_v(x) + dv(x)
    y = mixer(streams, x, (H, W));   out = to_out(y) + do(y)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safari.filters import HyenaFilter
from safari.head_groups import ProjectedStreams
from safari.offset_filters import OffsetFilter
from sd_hyena.errors import BadInput
from sd_hyena.options.operators import operator_named
from sd_hyena.sites import Site

Size = tuple[int, int]


class Projections(NamedTuple):
    """A site's own projections; `to_out` is diffusers' list of a linear layer and a dropout."""

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.Module

    @classmethod
    def of(cls, attention: nn.Module) -> Projections:
        return cls(attention.to_q, attention.to_k, attention.to_v, attention.to_out)


@dataclass(frozen=True)
class StudentSpec:
    """All that is needed to build a student again; stored in its file."""

    site: str
    short: str
    channels: int
    operator: str
    options: dict[str, Any]
    size: Size | None  # the one (H, W) it works at, None for any

    def serves(self, size: Size) -> bool:
        """Whether the student works on a grid (H, W)."""
        return self.size is None or tuple(self.size) == tuple(size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spec_for(site: Site, operator: str, options: dict[str, Any], latent_size: Size) -> StudentSpec:
    """The spec of a new student of `site`. A 1-D filter belongs to one (H, W): another width gives every lag another
    meaning. Raises BadInput for an operator that there is not."""
    declared = operator_named(operator)
    size = site.size(*latent_size) if declared.one_size else None
    heads = {"heads": site.heads} if declared.heads else {}
    return StudentSpec(site.name, site.short, site.channels, operator, heads | options, size)


def made(spec: StudentSpec) -> nn.Module:
    """The mixer of a spec. Raises ValueError or TypeError for options that cannot work."""
    operator = operator_named(spec.operator)
    tokens = (math.prod(spec.size),) if operator.one_size else ()
    return operator.resolve()(spec.channels, *tokens, **spec.options)


def build_student(spec: StudentSpec) -> Student | PublishedStudent:
    """Raises BadInput for options that cannot work."""
    try:
        operator = operator_named(spec.operator)
        operator.check(spec.options)
        return Student(spec) if operator.count_streams(spec.options) else PublishedStudent(spec)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"operator {spec.operator} for {spec.short}: {reason}") from None


def cast(student: nn.Module, like: Tensor) -> nn.Module:
    """Move a student to a tensor's device and dtype; its implicit filters stay in float32."""
    if isinstance(student, (HyenaFilter, OffsetFilter)):
        return student.to(like.device)
    for part in (*student.parameters(recurse=False), *student.buffers(recurse=False)):
        part.data = part.data.to(like)
    for child in student.children():
        cast(child, like)
    return student


def _check_size(spec: StudentSpec, size: Size) -> None:
    if not spec.serves(size):
        ours, theirs = ("{1}x{0}".format(*s) for s in (spec.size, size))
        raise BadInput(
            f"the student of {spec.short} was trained for {ours} cells and met {theirs}; "
            f"generate at the size it was trained for, or train at this one"
        )


def foldable(projection: nn.Module, x: Tensor, own: torch.dtype) -> bool:
    """Whether a change may be added to the weight instead of the answer: a plain layer that nobody stands around (a LoRA,
    quantisation, weights that wait elsewhere), in the student's dtype. Training keeps the two apart."""
    hooks = projection._forward_hooks, projection._forward_pre_hooks
    return (
        not torch.is_grad_enabled()
        and type(projection) is nn.Linear
        and "forward" not in vars(projection)
        and not any(hooks)
        and type(projection.weight) is nn.Parameter
        and projection.weight.dtype == x.dtype == own
    )


class Student(nn.Module):
    """A mixer between the site's own projections plus their trained change."""

    def __init__(self, spec: StudentSpec):
        super().__init__()
        self.spec = spec
        d, operator = spec.channels, operator_named(spec.operator)
        self.mixer = made(spec)
        streams = operator.count_streams(spec.options)
        self.change = nn.ModuleList(nn.Linear(d, d) for _ in range(streams))  # of q, k, ..., v
        self.change_out = nn.Linear(d, d, bias=False)
        for layer in (*self.change, self.change_out):
            nn.init.zeros_(layer.weight)
        for layer in self.change:
            nn.init.zeros_(layer.bias)
        if operator.gates:
            for gate in self.change[:-1]:
                nn.init.ones_(gate.bias)  # gates start near one, so the student starts as its value path

    def forward(self, x: Tensor, projections: Projections, size: Size) -> Tensor:
        """(B, L, D) -> (B, L, D) in x's dtype; the student computes in its own, the site's projections in theirs.

        Raises BadInput at a size the operator cannot serve.
        """
        _check_size(self.spec, size)
        own = self.change_out.weight.dtype
        x_ = x.to(own)
        y = self.mixer(self._streams(x, x_, projections), x_, size)
        out, dropout = projections.to_out
        if foldable(out, x, own):
            weight = (out.weight + self.change_out.weight).mT.expand(len(y), -1, -1)  # y's channels lie outermost
            return dropout(torch.bmm(y, weight) if out.bias is None else torch.baddbmm(out.bias, y, weight))
        return dropout(out(y.to(x.dtype)) + self.change_out(y).to(x.dtype))

    def _streams(self, x: Tensor, x_: Tensor, projections: Projections) -> Sequence[Tensor]:
        """The site's projections of x plus the change of x_, which is x in the student's dtype."""
        q, k, v = projections[:3]
        sources = (q, *[k] * (len(self.change) - 2), v)
        if all(foldable(source, x, x_.dtype) for source in sources):
            weights, biases = [], []
            for source, change in zip(sources, self.change, strict=True):
                weights.append(source.weight + change.weight)
                biases.append(change.bias if source.bias is None else source.bias + change.bias)
            return ProjectedStreams(x, torch.stack(weights), torch.stack(biases))
        q, k, v = (project(x).to(x_.dtype) for project in (q, k, v))
        streams = (q, *[k] * (len(self.change) - 2), v)
        return tuple(s + change(x_) for s, change in zip(streams, self.change, strict=True))


class PublishedStudent(nn.Module):
    """A student whose operator has projections of its own, as safari's and the ancestor's: blind to the site's."""

    def __init__(self, spec: StudentSpec):
        super().__init__()
        self.spec = spec
        self.operator = made(spec)

    def forward(self, x: Tensor, projections: Projections, size: Size) -> Tensor:
        _check_size(self.spec, size)
        return self.operator(x.to(self.operator.out_proj.weight.dtype)).to(x.dtype)
