"""What students would do in a model at a size, for a person to read."""

from __future__ import annotations

from torch import nn

from sd_hyena.cost.operations import attention_flops, folded_flops
from sd_hyena.sites import Site
from sd_hyena.students.checkpoint import StudentFile
from sd_hyena.students.student import PublishedStudent

from .sites import block_of


def report(sites: list[Site], file: StudentFile, width: int, height: int) -> str:
    """A line for each site of a model: its grid, its student and how many times cheaper; then all together."""
    students = {block_of(student.spec.short): student for student in file.students.values()}
    known = {block_of(site.short) for site in sites}
    lines, before, after = [f"{width}x{height} px"], 0, 0
    for site in sites:
        size = site.size(height // 8, width // 8)
        student, cost = students.get(block_of(site.short)), attention_flops(site, size)
        before += cost
        said, counted = _fit(student, site, size, cost)
        after += counted
        lines.append(f"{site.short:8} {size[1]}x{size[0]} cells, {site.channels} channels: {said}")
    strangers = [student.spec.short for block, student in students.items() if block not in known]
    if strangers:
        lines.append(f"not in this model: {' '.join(strangers)}")
    lines.append(f"all self-attentions together: {before / after:.1f} times cheaper, by counted operations")
    return "\n".join(lines)


def _fit(student: nn.Module | None, site: Site, size: tuple[int, int], attention: int) -> tuple[str, int]:
    """In words, and the operations that it comes to."""
    if student is None:
        return "attention, no student", attention
    spec = student.spec
    if spec.channels != site.channels:
        return f"attention, its student has {spec.channels} channels: trained for another kind of model", attention
    if not spec.serves(size):
        return "attention, its student serves {1}x{0} cells only".format(*spec.size), attention
    if isinstance(student, PublishedStudent):
        return "a published student", attention  # its own projections are not counted
    cost = folded_flops(spec, size)
    return f"{spec.operator}, {attention / cost:.1f} times cheaper", cost
