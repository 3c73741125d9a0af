"""The stages of a distillation: what the teacher shows in a lesson, and which errors of the students count.

layerwise    every student answers its site's own input as the teacher met it; sites are independent of each other
joint        students work inside the UNet, each on what the ones before it left; outputs, blocks and prediction count
end_to_end   the prediction counts, with and without the caption and as guidance combines them; outputs a little

A stage is `lesson(states)`, computed without gradient where the batch is, and `errors(students, lesson)` by name.
`states` is a batch of {"latents" (B, 4, h, w), "timestep" (B,), "text", "empty", "guidance" (B,)}; `text` and `empty` are
the conditions with a caption and without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.students.losses import error_and_spread, guided, min_snr_weight, relative_mse
from sd_hyena.students.teacher import Activation, Condition, Observation, Teacher

Students = Mapping[str, nn.Module]


class Layerwise:
    """Teacher forcing."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def lesson(self, states: Mapping[str, Any]) -> dict[str, Activation]:
        return self.teacher.activations(states["latents"], states["timestep"], states["text"])

    def errors(self, students: Students, lesson: Mapping[str, Activation]) -> dict[str, Tensor]:
        return {
            site: relative_mse(students[site](seen.input, seen.projections, seen.size), seen.target)
            for site, seen in lesson.items()
        }


@dataclass(frozen=True)
class Demonstration:
    """States, and what the teacher made of them."""

    latents: Tensor
    timestep: Tensor
    text: Condition
    guidance: Tensor
    shown: Observation


class Joint:
    """The relative errors of each site's output and of the transformer block around it, and of the prediction."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def lesson(self, states: Mapping[str, Any]) -> Demonstration:
        given = states["latents"], states["timestep"], states["text"]
        with torch.no_grad():
            return Demonstration(*given, states["guidance"], self.teacher.observe(*given))

    def errors(self, students: Students, lesson: Demonstration) -> dict[str, Tensor]:
        tried = self.teacher.observe(lesson.latents, lesson.timestep, lesson.text, students)
        errors = {"prediction": relative_mse(*(_tokens(o.prediction) for o in (tried, lesson.shown)))}
        for site in students:
            output = relative_mse(tried.outputs[site], lesson.shown.outputs[site])
            errors[site] = output + relative_mse(tried.blocks[site], lesson.shown.blocks[site])
        return errors


class EndToEnd:
    """The prediction's error, weighted by Min-SNR (Hang et al. 2023, gamma 5), and the guided prediction's.

    Guidance multiplies the difference of the two branches, and with it their errors; its scale comes with the state.
    """

    def __init__(self, teacher: Teacher, scheduler: Any, feature_weight: float, guidance_weight: float):
        self.teacher, self.scheduler = teacher, scheduler
        self.feature_weight, self.guidance_weight = feature_weight, guidance_weight

    def lesson(self, states: Mapping[str, Any]) -> Demonstration:
        """Every state twice: with its caption, then without."""
        latents, timestep = (torch.cat([states[name]] * 2) for name in ("latents", "timestep"))
        text, empty = states["text"], states["empty"]
        given = latents, timestep, {name: torch.cat([text[name], empty[name]]) for name in text}
        with torch.no_grad():
            return Demonstration(*given, states["guidance"], self.teacher.observe(*given))

    def errors(self, students: Students, lesson: Demonstration) -> dict[str, Tensor]:
        tried = self.teacher.observe(lesson.latents, lesson.timestep, lesson.text, students)
        weight = min_snr_weight(self.scheduler, lesson.timestep)
        ours, truth = (_tokens(o.prediction) for o in (tried, lesson.shown))
        errors = {"prediction": _weighted(ours, truth, weight)}
        if self.guidance_weight:
            pairs, scale = len(weight) // 2, lesson.guidance[:, None, None]
            both = (guided(p[:pairs], p[pairs:], scale) for p in (ours, truth))
            errors["guidance"] = self.guidance_weight * _weighted(*both, weight[:pairs])
        if self.feature_weight:
            for site in students:
                error = relative_mse(tried.outputs[site], lesson.shown.outputs[site])
                errors[site] = self.feature_weight * error
        return errors


Stage = Layerwise | Joint | EndToEnd


@torch.no_grad()
def prediction_error(teacher: Teacher, students: Students, states: Mapping[str, Any]) -> Tensor:
    """Squared error and spread (2,) of the UNet's prediction with these students, summed over a batch of states."""
    given = states["latents"], states["timestep"], states["text"]
    ours, truth = (_tokens(teacher.observe(*given, s).prediction) for s in (students, None))
    return torch.stack([part.sum() for part in error_and_spread(ours, truth)])


def _tokens(prediction: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C)."""
    return prediction.flatten(2).mT


def _weighted(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    error, spread = error_and_spread(prediction, target)
    return (weight * error).sum() / (weight * spread).sum()
