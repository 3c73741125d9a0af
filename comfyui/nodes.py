"""The nodes. Their ids stand in people's workflows and never change."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.options.landmarks import COUNT
from sd_hyena.sites import select
from sd_hyena.students.checkpoint import StudentFile, describe, load_students
from sd_hyena.students.student import cast
from sd_hyena.students.untrained import untrained

from . import engine, exact_vae
from .mixing import mixing_of
from .report import report
from .sites import block_of, find_sites
from .swap import Swap

CATEGORY = "hyena"
DTYPES = {"as in the file": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SITES = ("STRING", {"default": "all", "tooltip": "names (IN01,OUT11), level0, level1, all, or a pattern (OUT*)"})
START = ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "of the schedule"})
END = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "of the schedule"})
SIDE = {"default": 2048, "min": 64, "max": 32768, "step": 8}
TILE = ("INT", {"default": 0, "min": 0, "max": 8192, "step": 64, "tooltip": "pixels; 0: as large as the memory allows"})


class LoadStudents:
    DESCRIPTION = "Students that sd_hyena trained (models/hyena), and what their file says of them."
    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("HYENA", "STRING"), ("students", "description")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"file": (engine.student_files(),), "dtype": (list(DTYPES),)},
            "optional": {"with_students": ("HYENA", {"tooltip": "of another file, to be used beside these"})},
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **_others: Any) -> str:
        status = os.stat(engine.student_path(file))
        return f"{status.st_mtime_ns} {status.st_size}"

    def load(self, file: str, dtype: str, with_students: StudentFile | None = None) -> tuple[StudentFile, str]:
        loaded = load_students(engine.student_path(file))
        for student in loaded.students.values():
            student.requires_grad_(False)
            if DTYPES[dtype] is not None:
                cast(student, torch.empty(0, dtype=DTYPES[dtype]))
        text = describe(loaded)
        if with_students is not None:
            twice = [s.spec.short for name, s in loaded.students.items() if name in with_students.students]
            if twice:
                raise BadInput(f"both files have a student for {' '.join(twice)}; a site can have one")
            loaded = StudentFile(with_students.students | loaded.students, loaded.training)
        return loaded, text


class ApplyStudents:
    DESCRIPTION = "The model with students in place of self-attentions."
    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "students": ("HYENA",), "sites": SITES, "start": START, "end": END}}

    def apply(self, model: Any, students: StudentFile, sites: str, start: float, end: float) -> tuple[Any]:
        chosen = {block_of(site.short) for site in select(find_sites(engine.unet_of(model)), sites)}
        mixings = {block_of(student.spec.short): mixing_of(student) for student in students.students.values()}
        mixings = {block: mixing for block, mixing in mixings.items() if block in chosen}
        if not mixings:
            shorts = " ".join(student.spec.short for student in students.students.values())
            raise BadInput(f"sites={sites!r}: the file has students for {shorts}, none of which is asked for here")
        return (Swap(mixings, engine.sigmas(model, start, end)).apply(model),)


class ApplyLandmarks:
    DESCRIPTION = (
        "The model with attention by way of landmarks, found anew in each picture: no training, no file. More landmarks are "
        "closer to attention and slower. Small grids keep attention, which is cheaper there."
    )
    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        landmarks = ("INT", {"default": COUNT, "min": 8, "max": 4096, "step": 8, "tooltip": "of each head"})
        return {"required": {"model": ("MODEL",), "landmarks": landmarks, "sites": SITES, "start": START, "end": END}}

    def apply(self, model: Any, landmarks: int, sites: str, start: float, end: float) -> tuple[Any]:
        chosen = select(find_sites(engine.unet_of(model)), sites)
        students = untrained(None, chosen, landmarks).students.values()
        mixings = {block_of(student.spec.short): mixing_of(student) for student in students}
        return (Swap(mixings, engine.sigmas(model, start, end)).apply(model),)


class ModelInfo:
    DESCRIPTION = "Which students fit the model, and how many times cheaper its self-attentions get at a size."
    CATEGORY, FUNCTION = CATEGORY, "tell"
    RETURN_TYPES, OUTPUT_NODE = ("STRING",), True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "students": ("HYENA",),
                "width": ("INT", SIDE),
                "height": ("INT", SIDE),
            }
        }

    def tell(self, model: Any, students: StudentFile, width: int, height: int) -> dict[str, Any]:
        text = report(find_sites(engine.unet_of(model)), students, width, height)
        return {"ui": {"text": (text,)}, "result": (text,)}


class DecodeExactly:
    DESCRIPTION = "Latents to an image in tiles, with the answer of the untiled VAE: no seams, bounded memory."
    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",), "tile_size": TILE}}

    def decode(self, samples: dict[str, Tensor], vae: Any, tile_size: int) -> tuple[Tensor]:
        return (exact_vae.decode(vae, samples["samples"], tile_size),)


class EncodeExactly:
    DESCRIPTION = "An image to latents in tiles, with the answer of the untiled VAE: no seams, bounded memory."
    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"pixels": ("IMAGE",), "vae": ("VAE",), "tile_size": TILE}}

    def encode(self, pixels: Tensor, vae: Any, tile_size: int) -> tuple[dict[str, Tensor]]:
        return ({"samples": exact_vae.encode(vae, pixels, tile_size)},)


NODES = {
    "HyenaLoadStudents": ("Load Hyena Students", LoadStudents),
    "HyenaApplyStudents": ("Apply Hyena Students", ApplyStudents),
    "HyenaApplyLandmarks": ("Apply Landmarks (no training)", ApplyLandmarks),
    "HyenaModelInfo": ("Hyena Model Info", ModelInfo),
    "HyenaVAEDecode": ("VAE Decode (exact tiles)", DecodeExactly),
    "HyenaVAEEncode": ("VAE Encode (exact tiles)", EncodeExactly),
}
NODE_CLASS_MAPPINGS = {name: node for name, (_, node) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (title, _) in NODES.items()}
