"""Trained students on disk: one self-describing file per run.

    python -m sd_hyena.students.checkpoint FILE      says what a file is

A file holds the students' tensors as `<site>/<parameter>` and one metadata entry, `sd_hyena`, with a JSON header:
format version, the spec of each student, and how it was trained. The ancestor's files (hnmr293/sd-hyena) are read too.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import read_weights, write_weights
from sd_hyena.files.weights_kind import kind_of
from sd_hyena.sites import Site, find_sites, select
from sd_hyena.students.student import StudentSpec, build_student, cast

FORMAT_VERSION = 1
ANCESTOR = "hnmr293/sd-hyena"


@dataclass
class StudentFile(Mapping[str, nn.Module]):
    """The content of a file: students by site path, which it is a mapping of, and what is known of their training."""

    students: dict[str, nn.Module]
    training: dict[str, Any] = field(default_factory=dict)  # options, step, teacher's sha256, metrics, versions

    @property
    def names_its_sites(self) -> bool:
        """Older files of the ancestor's do not."""
        return self.training.get("origin") != ANCESTOR or "target" in self.training

    def __getitem__(self, site: str) -> nn.Module:
        return self.students[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.students)

    def __len__(self) -> int:
        return len(self.students)


def save_students(path: str | Path, file: StudentFile) -> None:
    """Write `.safetensors` or `.pt` by the path's suffix, all or nothing."""
    specs = [student.spec for student in file.students.values()]
    weights = {site: student.state_dict() for site, student in file.students.items()}
    write_students(path, specs, weights, file.training)


def write_students(
    path: str | Path, specs: list[StudentSpec], weights: dict[str, dict[str, Tensor]], training: dict[str, Any]
) -> None:
    """The same from specs and state dicts by site, for weights that are in no module (averaged ones)."""
    header = {"format_version": FORMAT_VERSION, "students": [spec.to_dict() for spec in specs], "training": training}
    tensors = {f"{site}/{name}": value for site, state in weights.items() for name, value in state.items()}
    write_weights(path, tensors, {"sd_hyena": json.dumps(header)})


def load_students(
    path: str | Path, unet: nn.Module | None = None, target: str = "IN01", like: Tensor | None = None
) -> StudentFile:
    """Read students and check them: format, keys, shapes, finiteness; with `unet` also that their sites exist there.

    They come ready to be swapped in: where and in the precision that `like` is, by default the UNet, else as stored.
    `target` names the site of an ancestor's file, which knows it only since its last version. Raises BadInput.
    """
    tensors, metadata = read_weights(path)
    try:
        if "sd_hyena" in metadata:
            file = _from_header(tensors, json.loads(metadata["sd_hyena"]))
        elif "in_proj.weight" in tensors:
            file = _from_ancestor(tensors, metadata, target, unet)
        else:
            raise BadInput(f"it holds no students and looks like {kind_of(tensors)}; expected a file of train.py")
        if unet is not None:
            _check_sites(file, unet)
    except BadInput as error:
        raise BadInput(f"{str(path)!r}: {error}") from None
    except Exception as error:  # whatever a student stumbles over that is built as the header says
        raise BadInput(f"{str(path)!r}: damaged header ({type(error).__name__}: {str(error)[:160]})") from None
    if like is None and unet is not None:
        like = next(unet.parameters())
    for student in file.values() if like is not None else ():
        cast(student, like)
    return file


def _from_header(tensors: dict[str, Tensor], header: dict[str, Any]) -> StudentFile:
    if header["format_version"] != FORMAT_VERSION:
        raise BadInput(f"format version {header['format_version']} is not {FORMAT_VERSION}; update sd_hyena")
    students = {}
    for entry in header["students"]:
        size = tuple(entry["size"]) if entry["size"] else None
        spec = StudentSpec(**{**entry, "size": size})
        prefix = f"{spec.site}/"
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        students[spec.site] = _filled(spec, state)
    strangers = [name for name in tensors if name.split("/")[0] not in students]
    if not students or strangers:
        raise BadInput(f"tensors of no student: {', '.join(strangers[:3])}" if strangers else "it holds no students")
    return StudentFile(students, dict(header["training"]))


def _filled(spec: StudentSpec, state: dict[str, Tensor]) -> nn.Module:
    """Nothing is allocated that the file does not hold: the header is first tried without memory."""
    counts = (spec.channels, *(spec.size or (1, 1)))
    if not all(type(count) is int and count > 0 for count in counts) or len(counts) != 3:
        raise BadInput(
            f"{spec.short}: its header counts in {str(counts)[:80]}; expected whole numbers, height and width"
        )
    with _WithoutMemory(state):
        expected = build_student(spec).state_dict()
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise BadInput(f"{spec.short}: missing {missing[:3]}, not expected {extra[:3]}")
    for name, value in state.items():
        if value.shape != expected[name].shape:
            raise BadInput(f"{spec.short}: {name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise BadInput(f"{spec.short}: {name} holds NaN, infinities or whole numbers; train again")
    student = build_student(spec)
    student.load_state_dict(state)
    return student.eval()


class _WithoutMemory(TorchDispatchMode):
    """What is made inside has shapes only. Refuses a tensor larger than all that a file holds, and work without end.

    Raises BadInput, whatever the operator. Small tensors and so many calls are free. `torch.device("meta")` would not do:
    it passes over what a library has patched.
    """

    free_numbers, free_calls = 1 << 20, 1 << 14

    def __init__(self, state: dict[str, Tensor]):
        super().__init__()
        self.held = sum(value.numel() for value in state.values())
        self.calls = self.free_calls + 64 * len(state)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if any(argument.name == "device" for argument in function._schema.arguments):
            kwargs["device"] = torch.device("meta")
        self.calls -= 1
        try:
            made = function(*args, **kwargs)
        except RuntimeError as error:  # among others of a size that no integer can tell
            raise BadInput(f"it cannot be made as its header says ({str(error)[:80]})") from None
        if self.calls < 0 or (isinstance(made, Tensor) and made.numel() > max(self.held, self.free_numbers)):
            raise BadInput(f"its header claims more than the {self.held} numbers that the file holds")
        return made.to("meta") if isinstance(made, Tensor) and not made.is_meta else made


def _from_ancestor(
    tensors: dict[str, Tensor], metadata: dict[str, str], target: str, unet: nn.Module | None
) -> StudentFile:
    """Rebuild safari's options from the shapes: the ancestor did not store them. Its width and height are tokens."""
    short = metadata.get("target", target).upper()
    channels = tensors["out_proj.weight"].shape[0]
    inner = [name for name in tensors if name.startswith("filter_fn.implicit_filter.") and name.endswith(".bias")]
    options = dict(
        order=tensors["in_proj.weight"].shape[0] // channels - 1,
        filter_order=tensors["filter_fn.implicit_filter.0.weight"].shape[0],
        short_filter_order=tensors["short_filter.weight"].shape[-1],
        emb_dim=tensors["filter_fn.pos_emb.z"].shape[-1],
        num_inner_mlps=len(inner) - 1,
    )
    tokens = tensors["filter_fn.pos_emb.z"].shape[1]
    width = int(metadata.get("train_width", 0)) or round(tokens**0.5)
    height = int(metadata.get("train_height", 0)) or tokens // width
    if width * height != tokens:
        raise BadInput(f"it was trained on {tokens} tokens, which is not {width}x{height}")
    site = _find(short, unet)
    spec = StudentSpec(site.name if site else short, short, channels, "safari", options, (height, width))
    # safetensors stores a shared tensor once; all the sines share theirs.
    sines = [f"filter_fn.implicit_filter.{2 * i + 1}.freq" for i in range(len(inner))]
    shared = next(tensors[name] for name in sines if name in tensors)
    state = {f"operator.{name}": value for name, value in (dict.fromkeys(sines, shared) | tensors).items()}
    student = _filled(spec, state)
    said = {name: metadata[name] for name in sorted(metadata) if metadata[name] not in tensors and name != "format"}
    return StudentFile({spec.site: student}, {"origin": ANCESTOR, **said})  # not which tensors are shared


def _find(short: str, unet: nn.Module | None) -> Site | None:
    return select(find_sites(unet), short)[0] if unet is not None else None


def _check_sites(file: StudentFile, unet: nn.Module) -> None:
    sites = {site.name: site for site in find_sites(unet)}
    for name, student in file.students.items():
        if name not in sites:
            raise BadInput(
                f"its site {name} does not exist in this model; it has {' '.join(s.short for s in sites.values())}"
            )
        if sites[name].channels != student.spec.channels:
            raise BadInput(
                f"{student.spec.short} has {student.spec.channels} channels in the file and "
                f"{sites[name].channels} in this model; use the model it was trained on"
            )


def describe(file: StudentFile) -> str:
    """A few lines for a person."""
    lines = []
    for student in file.students.values():
        spec = student.spec
        size = "any size" if spec.size is None else f"{spec.size[1]}x{spec.size[0]} cells only"
        count = sum(p.numel() for p in student.parameters())
        options = " ".join(f"{k}={v}" for k, v in spec.options.items())
        lines.append(f"{spec.short}  {spec.operator} {options}  {spec.channels} channels, {size}, {count:,} parameters")
    lines += [f"{name}: {value}" for name, value in file.training.items() if not isinstance(value, dict)]
    for name, group in file.training.items():
        if isinstance(group, dict):
            lines.append(f"{name}: " + ", ".join(f"{k}={v}" for k, v in group.items()))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import diffusers

    from sd_hyena import __version__

    return {"sd_hyena": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}


def command(arguments: list[str] | None = None) -> int:
    """Say what the one file is that is named; the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) != 1 or given[0] in ("-h", "--help"):
        print("usage: python -m sd_hyena.students.checkpoint FILE", file=sys.stderr)
        return 0 if given in (["-h"], ["--help"]) else 2
    try:
        print(describe(load_students(given[0])))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command())
