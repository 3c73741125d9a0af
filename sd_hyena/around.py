"""A module around another while a third computes: the seam of all that changes how a module is called."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


class Around(nn.Module):
    """A module that stands around another, `inner`, and decides how that one is called."""

    def __init__(self):
        super().__init__()
        self.inner: nn.Module | None = None


@contextmanager
def standing(owner: nn.Module, path: str, around: Around) -> Iterator[None]:
    """Within the block, `around` stands at `path` of `owner` during each call of `owner`, around what is there then.

    Between the calls the model is as ever, so its keys, a swap, a LoRA, fused projections and attention processors see
    what they always see, whether they come before or after. Blocks nest: the outer block's module stands outermost.
    """
    forward, own = owner.forward, vars(owner).get("forward")

    @functools.wraps(forward)
    def surrounded(*args, **kwargs):
        around.inner = owner.get_submodule(path)
        owner.set_submodule(path, around)
        try:
            return forward(*args, **kwargs)
        finally:
            owner.set_submodule(path, around.inner)
            around.inner = None

    owner.forward = surrounded
    try:
        yield
    finally:
        if own is None:
            del owner.forward
        else:
            owner.forward = own
