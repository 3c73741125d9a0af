"""Pictures that evaluations drew, on disk by all that they depend on: what was drawn once is not drawn again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import safari
from sd_hyena.distil.pieces import Check, Pieces
from sd_hyena.files.hashes import file_sha256
from sd_hyena.generate.engine import Model
from sd_hyena.models.location import loaded_sha256
from sd_hyena.options import given_path
from sd_hyena.options.command_line import with_paths
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.students.checkpoint import versions

OF_EACH = ("prompt", "seed")  # options that tell the pictures of a set apart
LOADED = ("model", "device", "dtype")  # options that are known by what came of them


class Cache:
    """Of one model, as an engine loaded it, in a folder."""

    def __init__(self, folder: Path, model: Model):
        self.folder, unet = folder, next(model.pipe.unet.parameters())
        device = torch.cuda.get_device_name(unet.device) if unet.is_cuda else unet.device.type
        self.facts = [versions(), loaded_sha256(model.path), device, str(unet.dtype)]
        self._students: dict[int, tuple[Any, str]] = {}

    def of(
        self,
        what: str,
        configs: Sequence[GenerateConfig],
        check: Check,
        students: Mapping[str, nn.Module] | None = None,
    ) -> Pieces:
        """A set of `what`: configs that differ in prompt and seed alone, drawn with these students, by site."""
        options = {name: value for name, value in vars(configs[0]).items() if name not in (*OF_EACH, *LOADED)}
        depends_on = [what, self.facts, options, self._sha256(students) if students else ""]
        key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        folder = self.folder / f"{what}-{configs[0].width}x{configs[0].height}-{key}"
        return Pieces(folder, [_name(config) for config in configs], check)

    def _sha256(self, students: Mapping[str, nn.Module]) -> str:
        if id(students) not in self._students:
            self._students[id(students)] = students, students_sha256(students)
        return self._students[id(students)][1]


def _name(config: GenerateConfig) -> str:
    """A picture's in its set; LoRAs that its prompt calls count by their content."""
    loras = [(file_sha256(path), weight) for path, weight in given_path.loras(with_paths(config).lora)]
    return f"{config.seed}-{hashlib.sha256(json.dumps([config.prompt, loras]).encode()).hexdigest()[:16]}"


def students_sha256(students: Mapping[str, nn.Module]) -> str:
    """The hash of students by site, whatever file they come from: specs, numbers, and the code that they are made of."""
    digest = hashlib.sha256()
    for site, student in sorted(students.items()):
        digest.update(json.dumps([site, student.spec.to_dict()], sort_keys=True).encode())
        for name, value in student.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for file in _code_of(students):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _code_of(students: Mapping[str, nn.Module]) -> list[Path]:
    """The operators', and of others than ours their own: whoever works on one measures what it is now."""
    modules = {type(module).__module__ for student in students.values() for module in student.modules()}
    files = [getattr(sys.modules[name], "__file__", None) for name in modules if name.partition(".")[0] != "torch"]
    return sorted({*Path(safari.__file__).parent.glob("*.py"), *(Path(file) for file in files if file)})
