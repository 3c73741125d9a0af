"""Putting students in place of sites, and taking them out again, exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from sd_hyena.sites import on_size
from sd_hyena.students.student import Projections


class StandIn(nn.Module):
    """A site's `attn1` with its mixing done by a student; keeps the names `to_q to_k to_v to_out`, so LoRA finds them.

    The module is replaced, not the attention's processor: diffusers throws processors away (attention slicing, fused
    QKV, IP-Adapter) and leaves modules alone.
    """

    def __init__(self, attention: nn.Module, student: nn.Module):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = Projections.of(attention)
        self.student, self.heads = student, attention.heads
        self.size: tuple[int, int] | None = None  # set by the enclosing transformer before each call
        self.register_state_dict_post_hook(_without_student)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs,
    ) -> Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("a student stands in for plain self-attention: no encoder states, no mask")
        return self.student(hidden_states, Projections.of(self), self.size)


def _without_student(_stand_in: StandIn, state: dict[str, Tensor], prefix: str, _metadata: dict) -> None:
    """What is saved of a UNet while students are in it is the UNet itself."""
    for name in [name for name in state if name.startswith(f"{prefix}student.")]:
        del state[name]


@contextmanager
def swapped(unet: nn.Module, students: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """Within the block, the self-attentions named by `students` (module paths) compute with their students.

    Afterwards, also after an exception, the original modules are back in place, bit for bit; a LoRA loaded or unloaded
    meanwhile is kept. Raises KeyError for a path that is no site, before anything is changed.
    """
    originals = {}
    for name in students:
        try:
            originals[name] = unet.get_submodule(name)
        except AttributeError:
            raise KeyError(f"{name} is no module of this UNet") from None
        if not hasattr(originals[name], "to_q"):
            raise KeyError(f"{name} is no self-attention")
    stand_ins = {name: StandIn(originals[name], student) for name, student in students.items()}
    hooks = []
    try:
        for name, stand_in in stand_ins.items():
            unet.set_submodule(name, stand_in)
            hooks.append(on_size(unet, name, partial(setattr, stand_in, "size")))
        yield unet
    finally:
        for hook in hooks:
            hook.remove()
        for name, original in originals.items():
            for projection, module in Projections.of(stand_ins[name])._asdict().items():
                setattr(original, projection, module)
            unet.set_submodule(name, original)
