"""What stands in for something of a model or pipeline for a while: an attribute, or a module around another."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    forward = owner.forward

    @functools.wraps(forward)
    def surrounded(*args, **kwargs):
        around.inner = owner.get_submodule(path)
        owner.set_submodule(path, around)
        try:
            return forward(*args, **kwargs)
        finally:
            owner.set_submodule(path, around.inner)
            around.inner = None

    with replaced(owner, "forward", surrounded):
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, an attribute of this instance is `value`; whatever it had of its own is put back afterwards."""
    own, missing = vars(owner), object()
    before = own.get(name, missing)
    own[name] = value
    try:
        yield
    finally:
        if before is missing:
            del own[name]
        else:
            own[name] = before
