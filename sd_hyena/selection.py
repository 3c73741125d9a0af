"""`-t auto`: which sites to replace, by what each saves at the asked size against the error it costs.

A short pilot distils every site that a student would make cheaper; its errors rank them.
"""

from __future__ import annotations

from dataclasses import dataclass

from sd_hyena.errors import BadInput


@dataclass(frozen=True)
class Candidate:
    """A site, its cost as attention and as a student (operations), and its pilot's relative error."""

    short: str
    attention: int
    student: int
    error: float

    @property
    def saved(self) -> int:
        return self.attention - self.student


def choose(candidates: list[Candidate], total: int, max_error: float = 0.0, budget: float = 0.0) -> list[Candidate]:
    """The sites to replace, the best first: by operations saved for each unit of error.

    With `max_error` all whose own error is at most that. With `budget` as few as make the UNet, `total` operations as it
    is, `budget` times cheaper; both may be given. Raises BadInput if nothing qualifies or the budget cannot be met.
    """
    useful = [c for c in candidates if c.saved > 0 and (not max_error or c.error <= max_error)]
    useful.sort(key=lambda c: c.saved / max(c.error, 1e-9), reverse=True)
    if not useful:
        low = min(candidates, key=lambda c: c.error)
        raise BadInput(
            f"target=auto: no site is both cheaper as a student at this size and within max_error={max_error:g}; "
            f"the smallest error is {low.error:.4f} ({low.short})"
        )
    if not budget:
        return useful
    chosen, left = [], total
    for candidate in useful:
        if total / left >= budget:
            break
        chosen.append(candidate)
        left -= candidate.saved
    if total / left < budget:
        raise BadInput(
            f"budget={budget:g}x cannot be met: all {len(useful)} useful sites make the UNet {total / left:.2f} times "
            f"cheaper at this size; ask for less, a larger size, or a larger max_error"
        )
    return chosen


def table(candidates: list[Candidate], chosen: list[Candidate], total: int) -> str:
    """What was considered and chosen, for a person."""
    lines = [f"{'site':<8}{'attention GFLOP':>16}{'student GFLOP':>15}{'pilot error':>13}  choice"]
    for c in candidates:
        said = "student" if c in chosen else "attention, cheaper" if c.saved <= 0 else "attention"
        lines.append(f"{c.short:<8}{c.attention / 1e9:>16.2f}{c.student / 1e9:>15.2f}{c.error:>13.4f}  {said}")
    left = total - sum(c.saved for c in chosen)
    lines.append(f"whole UNet: {total / 1e9:.1f} -> {left / 1e9:.1f} GFLOP, {total / left:.2f} times cheaper")
    return "\n".join(lines)
