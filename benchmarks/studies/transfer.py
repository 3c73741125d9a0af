"""python -m benchmarks.studies.transfer STUDENTS: what students trained on a model are worth on its fine-tune and with a LoRA.

Students add their change to the projections of whatever model they are put into. Beside them the same students with the
parent's projections copied into them, as a module that carries its own would have it, and the same sites untrained, which
know no parent. `examples.tiny_sd.finetune` makes the children.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness.record import write
from sd_hyena.evaluate.config import EvaluationConfig, checked
from sd_hyena.evaluate.examiner import Examiner
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.options.shipped import SHIPPED_MODEL
from sd_hyena.students.checkpoint import load_students
from sd_hyena.students.student import Projections
from sd_hyena.students.untrained import untrained


class WithCopiedProjections(nn.Module):
    """A student that uses the parent's projections wherever it is put."""

    def __init__(self, student: nn.Module, parent: nn.Module):
        super().__init__()
        self.student, self.spec = student, student.spec
        self.parent = copy.deepcopy(Projections.of(parent)._asdict())

    def forward(self, x, projections, size):
        return self.student(x, Projections(**self.parent), size)


def main(students: str, children: str = "runs/pastel", states: int = 32, images: int = 16) -> None:
    """Evaluate on the parent and both children.

    Args:
        students: a file of train.py, trained on the shipped model
        children: the folder of `examples.tiny_sd.finetune`
        states: held-out states
        images: images of the judgement
    """
    parent = load_pipeline(SHIPPED_MODEL, torch.device("cpu"), torch.float32)
    rows = []
    for name in ("parent", "fine-tune", "LoRA"):
        model = str(Path(children) / "model") if name == "fine-tune" else ""
        given = dict(sizes="256", guidance="5", states=states, images=images, model=model, device="cpu")
        config = checked(EvaluationConfig(students=students, prompts=str(SHIPPED_MODEL / "prompts.txt"), **given))
        examiner = Examiner(config)
        unet = examiner.pipe.unet
        if name == "LoRA":
            examiner.pipe.load_lora_weights(Path(children) / "lora")
        own = load_students(config.students, unet).students
        copied = {site: WithCopiedProjections(own[site], parent.unet.get_submodule(site)) for site in own}
        unlearned = untrained(unet, [site for site in examiner.sites if site.name in own]).students
        for what, swapped_in in {
            "trained, the child's": own,
            "trained, copied": copied,
            "untrained": unlearned,
        }.items():
            ((_, found, _),) = examiner.examine(swapped_in)
            rows.append(_row(name, what, found))
            print(rows[-1], flush=True)
    write("transfer", rows, command=f"python -m benchmarks.studies.transfer {students}")


def _row(name: str, what: str, found: dict[str, Any]) -> dict[str, Any]:
    image = found["images"]["5"]
    return {
        "model": name,
        "students": what,
        **{site: float(f"{row['relative_mse']:.2g}") for site, row in found["sites"].items()},
        "prediction": float(f"{found['prediction']['both']:.2g}"),
        "guided_5": float(f"{found['prediction']['guided_5']:.2g}"),
        "psnr_median": round(image["psnr_median"], 1),
        "ssim": round(image["ssim_mean"], 3),
    }


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
