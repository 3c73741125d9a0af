"""What people are told of a drawing before it begins: what is done in another way than they may think, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sd_hyena.generate.alternatives import Alternative
from sd_hyena.generate.drawing import denoising_steps
from sd_hyena.generate.growth import Stage, grown
from sd_hyena.generate.order import Order
from sd_hyena.options.effect import in_vain
from sd_hyena.options.landmarks import Landmarks
from sd_hyena.options.sampler import note_on_steps


def of_order(order: Order, prompt: str) -> Iterator[str]:
    """Tiles, growing, options without effect, words of embeddings that no prompt says."""
    config, last = order.config, order.stages[-1]
    arrangement = last.arrangement
    few = note_on_steps(config.scheduler, denoising_steps(last.config))
    yield from filter(None, (str(arrangement), *arrangement.cuts_nothing, *in_vain(config)))
    yield from grown(config, order.stages)
    yield from filter(None, (*order.stages[0].task.notes, *arrangement.notes, few))
    texts = (prompt, config.negative_prompt, *arrangement.prompts)
    for embedding in order.embeddings:
        if embedding.asked and not any(embedding.word.lower() in text.lower() for text in texts):
            yield f"note: no prompt says {embedding.word!r}, the word of embeddings={str(embedding.path)!r}"


def of_students(stages: Sequence[Stage], by_stage: Sequence[Sequence[Alternative]], sha256: str) -> Iterator[str]:
    """Students of another model than that with this hash, and where landmarks stand in each stage."""
    for alternative in by_stage[-1]:
        if any(hash_ and hash_ != sha256 for hash_ in alternative.teacher_sha256):
            yield f"note: {alternative.label} was trained on another model; its change is added to this one's projections"
    for stage, alternatives in zip(stages, by_stage, strict=True):
        at = f" of {stage.config.width}x{stage.config.height}" if len(stages) > 1 else ""
        for alternative in alternatives:
            found: dict[str, list[str]] = {}
            for site, student in alternative.students.items():
                found.setdefault(alternative.files[site], []).append(student.spec.short)
            where = [f"{stem} at {' '.join(shorts)}" for stem, shorts in found.items() if Landmarks.read(stem)]
            if alternative.entry and not found:
                where = [f"{alternative.entry} at no site: attention is cheaper at this size"]
            if where:
                yield ", ".join(where) + at
