"""Where students start from: the weights of a file whose students compute the same as this run's."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from safari.filters import HyenaFilter
from safari.hyena import HyenaMixer
from sd_hyena.distil.allotment import with_count
from sd_hyena.errors import BadInput
from sd_hyena.options.operators import OPERATORS, operator_named
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.student import StudentSpec

ONLY_AT_THE_START = {"w"}  # told by the weights once there are some
OPTIMIZER = {"lr", "wd", "lr_pos_emb", "modulation_lr"}


def with_counts_of(path: str, specs: Sequence[StudentSpec], unet: nn.Module) -> list[StudentSpec]:
    """Specs whose landmarks are left open, with the numbers of the students that they start from."""
    stored = _stored(path, specs[0].short, unet)
    default = operator_named(specs[0].operator).options["landmarks"].default
    found = (stored[spec.site].spec.options if spec.site in stored else {} for spec in specs)
    return [with_count(spec, options.get("landmarks", default)) for spec, options in zip(specs, found, strict=True)]


def _stored(path: str, short: str, unet: nn.Module) -> dict[str, nn.Module]:
    """Of a file, as precise as they are in it; the ancestor's may not name their site."""
    return load_students(path, unet, short, torch.empty(0)).students


def start_from(path: str, students: dict[str, nn.Module], unet: nn.Module) -> None:
    """Fill students, by site, with the weights of those in a file. Raises BadInput, which says what differs."""
    shorts = [student.spec.short for student in students.values()]
    stored = _stored(path, shorts[0], unet)
    for site, student in students.items():
        if site not in stored:
            found = " ".join(other.spec.short for other in stored.values())
            raise BadInput(f"pretrained_weight={path!r} holds {found}, but this run trains {' '.join(shorts)}; see -t")
        if wrong := differences(stored[site], student):
            there, here = (", ".join(f"{name}={pair[n]}" for name, pair in wrong.items()) for n in (0, 1))
            flags = " ".join(_flags(stored[site].spec, wrong))
            way_out = f"give {flags}" if flags else "train with its options"
            raise BadInput(
                f"pretrained_weight={path!r}: {student.spec.short} has {there} there, {here} in this run; {way_out}"
            )
        student.load_state_dict(stored[site].state_dict())


def differences(stored: nn.Module, wanted: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What two students' specs say differently of what they compute; what a spec leaves out is the operator's default."""
    ours, theirs = stored.spec, wanted.spec
    pairs = {name: (getattr(ours, name), getattr(theirs, name)) for name in ("operator", "channels", "size")}
    if ours.operator == theirs.operator:
        said, told = ({**_defaults(s), **s.spec.options} for s in (stored, wanted))
        names = sorted((said.keys() | told.keys()) - ONLY_AT_THE_START - OPTIMIZER)
        pairs |= {name: (said.get(name), told.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _defaults(student: nn.Module) -> dict[str, Any]:
    operator = student.operator if hasattr(student, "operator") else student.mixer
    kinds = [kind for kind in type(operator).__mro__ if issubclass(kind, nn.Module)]
    kinds += [HyenaFilter] if isinstance(operator, HyenaMixer) else []  # its options are the filter's too
    found: dict[str, Any] = {}
    for kind in reversed(kinds):
        found |= {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.default is not p.empty}
    return found


def _flags(spec: StudentSpec, wrong: dict[str, tuple[Any, Any]]) -> list[str]:
    """The flags of train.py that would make the run's students those of the file."""
    operator, flags, options = OPERATORS[spec.operator], [], []
    for name, (there, _) in wrong.items():
        if name == "operator":
            flags.append(f"--operator {there}")
        elif name == "size" and there:  # of one site; how many pixels a token is depends on its level
            flags.append(f"-W and -H of {there[1]}x{there[0]} tokens")
        elif name in operator.ancestors:
            flags.append(f"--hyena_{name} {there}")
        elif name in operator.options:
            options.append(f"{name}={there}")
    return flags + ([f"--operator_options {','.join(options)}"] if options else [])
