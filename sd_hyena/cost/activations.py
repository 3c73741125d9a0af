"""Memory that training a student keeps for its backward pass. Nothing is computed."""

from __future__ import annotations

import torch

from sd_hyena.cost.nothing_computed import nothing_computed
from sd_hyena.cost.operations import fake_block
from sd_hyena.students.student import Size, StudentSpec


def saved_bytes(spec: StudentSpec, size: Size, dtype: torch.dtype) -> int:
    """Bytes of all storages that the forward pass of one sample saves on a grid (H, W), parameters left out."""
    kept = {}
    with nothing_computed():
        student, projections, x = fake_block(spec, size, dtype)
        own = {parameter.untyped_storage()._cdata for parameter in student.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        half = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), half:
            student(x, projections, size).float().square().sum()
        return sum(storage.nbytes() for storage in kept.values())
