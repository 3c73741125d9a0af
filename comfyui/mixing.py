"""What a student does between a block's own projections, and to what the block's own `to_out` makes of it.

B batch, L tokens, D channels, (H, W) the block's grid. A mixing takes the projections q, k, v and the tokens x, (B, L, D) each,
and returns what goes into `to_out` together with what is to be done to its answer.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from sd_hyena.students.student import PublishedStudent, Size, Student
from sd_hyena.students.untrained import Untrained

Finish = Callable[[Tensor], Tensor]
Answer = tuple[Tensor, Finish]


class Mixing:
    """A student's: `Student.forward` term by term, in the student's dtype."""

    def __init__(self, student: Student):
        self.module, self.channels = student, student.spec.channels

    def serves(self, size: Size) -> bool:
        return self.module.spec.serves(size)

    def pays(self, size: Size) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size) -> Answer:
        student = self.module
        own = student.change_out.weight.dtype
        x_, sources = x.to(own), (q, *[k] * (len(student.change) - 2), v)
        streams = tuple(s.to(own) + change(x_) for s, change in zip(sources, student.change, strict=True))
        y = student.mixer(streams, x_, size)
        change = student.change_out(y)
        return y.to(q.dtype), lambda out: out + change.to(out.dtype)


class PublishedMixing(Mixing):
    """The ancestor's student, which has projections of its own: its answer stands for the block's."""

    def __init__(self, student: PublishedStudent):
        super().__init__(student)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size) -> Answer:
        operator = self.module.operator
        y = operator(x.to(operator.out_proj.weight.dtype))
        return v, lambda out: y.to(out.dtype)


class UntrainedMixing(Mixing):
    """Of nothing but the block's projections, where the grid is large enough that this is the cheaper way."""

    def __init__(self, student: Untrained):
        super().__init__(student)

    def pays(self, size: Size) -> bool:
        return size[0] * size[1] > 8 * self.module.mixer.landmarks

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, size: Size) -> Answer:
        return self.module.mixer((q, k, v), x, size), lambda out: out


KINDS = {Student: Mixing, PublishedStudent: PublishedMixing, Untrained: UntrainedMixing}


def mixing_of(student: nn.Module) -> Mixing:
    return KINDS[type(student)](student)
