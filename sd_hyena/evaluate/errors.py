"""Errors on held-out states: of what sites answer, and of the prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch

from sd_hyena.cost.timing import block_seconds
from sd_hyena.evaluate.config import EvaluationConfig
from sd_hyena.evaluate.pictures import Pictures
from sd_hyena.evaluate.sharpness import entropy
from sd_hyena.models.condition import condition
from sd_hyena.models.latents import resized
from sd_hyena.models.prediction import as_noise, noiser
from sd_hyena.processes.progress import work
from sd_hyena.sites import Site
from sd_hyena.students.losses import by_timestep, error_and_spread, guided
from sd_hyena.students.teacher import Teacher


class Errors:
    """Of students in one model, on noisy states of pictures that the teacher drew."""

    def __init__(self, config: EvaluationConfig, prompts: Sequence[str], pictures: Pictures, sites: Sequence[Site]):
        self.config, self.prompts, self.pictures, self.sites = config, prompts, pictures, sites
        self.pipe = pictures.model.pipe
        self.noiser = noiser(self.pipe)
        self.states, self.branches = cache(self._states), cache(self._branches)

    def of_sites(self, students: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
        """Relative error of each site's answer to the teacher's own input, in all and by timestep; how sharp its attention
        is; block times."""
        chosen = [site for site in self.sites if site.name in students]
        teacher, result = Teacher(self.pipe.unet, chosen), {}
        heads = {site.name: site.heads for site in chosen}
        parts: dict[str, list] = {site.name: [] for site in chosen}
        entropies: dict[str, list] = {site.name: [] for site in chosen}
        for latents, timestep, text, empty in _told(self.states(size), "states at the sites"):
            for context in (text, empty):
                for name, seen in teacher.activations(latents, timestep, context).items():
                    with torch.no_grad():
                        answer = students[name](seen.input, seen.projections, seen.size)
                    error, spread = error_and_spread(answer, seen.target)
                    parts[name].append(torch.stack([error, spread, timestep.to(error)]))
                    entropies[name].append(entropy(seen.input, seen.projections, heads[name]))
        for site in chosen:
            error, spread, timestep = torch.cat(parts[site.name], dim=1)
            row = {"relative_mse": float(error.sum() / spread.sum())}
            row["entropy"] = float(torch.stack(entropies[site.name]).mean())
            row |= {name: float(share) for name, share in by_timestep(error, spread, timestep).items()}
            attention, cells = self.pipe.unet.get_submodule(site.name), site.size(size[1] // 8, size[0] // 8)
            seconds = block_seconds(attention, students[site.name], cells, batch=2, rounds=3)
            row["attention_ms"], row["student_ms"] = (1e3 * s for s in seconds)
            result[site.short] = row
        return result

    def of_prediction(self, students: dict[str, Any], size: tuple[int, int]) -> dict[str, float]:
        """Relative error of the UNet's prediction: with the caption, without, both, and guided at each scale.

        `as_noise` is that of both, told as the noise they foresee, whatever the model predicts: comparable between models.
        """
        scales = self.config.scales()
        names = ["conditional", "unconditional", "as_noise", *(f"guided_{scale:g}" for scale in scales)]
        sums = {name: torch.zeros(2) for name in names}
        for state, *pairs in zip(self.states(size), self.branches(size), self._branches(size, students), strict=True):
            noise = lambda *both, seen=state: as_noise(self.noiser, torch.cat(both), *seen[:2])
            truths, answers = ([c, u, noise(c, u), *(guided(c, u, scale) for scale in scales)] for c, u in pairs)
            for name, truth, ours in zip(names, truths, answers, strict=True):
                sums[name] += torch.stack([part.sum() for part in error_and_spread(ours, truth)]).cpu()
        both = sums["conditional"] + sums["unconditional"]
        return {name: float(e / s) for name, (e, s) in ({"both": both} | sums).items()}

    def _branches(self, size: tuple[int, int], students: dict[str, Any] | None = None) -> list[tuple]:
        """For each state the UNet's prediction (1, h w, C) with the caption and without, in float32."""
        teacher = Teacher(self.pipe.unet, [])
        with torch.no_grad():
            return [
                tuple(
                    teacher.observe(latents, timestep, context, students).prediction.float().flatten(2).mT
                    for context in (text, empty)
                )
                for latents, timestep, text, empty in _told(self.states(size), "states in the whole UNet")
            ]

    def _states(self, size: tuple[int, int]) -> list[tuple]:
        """Batches of one: noisy latents of images the teacher drew, their timestep, caption and the empty caption."""
        n, batches = self.config.states, []
        for i in _told(range(n), "states are made"):
            x0 = resized(self.pipe, self.pictures.latents(i), *size)
            noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(self.config.seed + i)).to(x0)
            t = torch.tensor([int((i + 0.5) * self.noiser.config.num_train_timesteps / n)])
            texts = [condition(self.pipe, prompt, *size) for prompt in (self.prompts[i], "")]
            batches.append((self.noiser.add_noise(x0, noise, t.to(x0.device)), t.to(x0.device), *texts))
        return batches


def _told(parts: Sequence[Any], what: str) -> Iterator[Any]:
    """The parts, shown as work."""
    with work(f"{len(parts)} {what}", len(parts)) as shown:
        for i, part in enumerate(parts):
            yield part
            shown.to(i + 1)
