"""`-t auto`: which sites to replace, by what each saves at the asked size against the error it costs.

A short pilot distils every site that a student would make cheaper; its errors rank them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sd_hyena.errors import BadInput


@dataclass(frozen=True)
class Candidate:
    """A site, its cost as attention and as a student (operations), its pilot's relative error, and how many times
    faster its student was measured to be."""

    short: str
    attention: int
    student: int
    error: float
    speedup: float = math.inf

    @property
    def saved(self) -> int:
        return self.attention - self.student

    @property
    def worthwhile(self) -> bool:
        """Whether a student makes the site cheaper, by operations and by the clock."""
        return self.saved > 0 and self.speedup > 1


def useful(candidates: list[Candidate], total: int, budget: float = 0.0) -> list[Candidate]:
    """Those that a student makes cheaper. Raises BadInput if there is none, or if all together miss the budget."""
    cheaper = [candidate for candidate in candidates if candidate.worthwhile]
    if not cheaper:
        raise BadInput("target=auto: at this size attention is the cheaper one at every site; ask for a larger size")
    possible = total / (total - sum(candidate.saved for candidate in cheaper))
    if budget > possible:
        raise BadInput(
            f"budget={budget:g}x cannot be met: students at all {len(cheaper)} sites make the UNet {possible:.2f} times "
            f"cheaper at this size; ask for less, or a larger size"
        )
    return cheaper


def choose(candidates: list[Candidate], total: int, max_error: float = 0.0, budget: float = 0.0) -> list[Candidate]:
    """The sites to replace, the best first: by operations saved for each unit of error.

    With `max_error` all whose own error is at most that. With `budget` as few as make the UNet, `total` operations as it
    is, `budget` times cheaper; both may be given. Raises BadInput if nothing qualifies or the budget cannot be met.
    """
    within = [c for c in useful(candidates, total, budget) if not max_error or c.error <= max_error]
    within.sort(key=lambda c: c.saved / max(c.error, 1e-9), reverse=True)
    if not within:
        best = min(useful(candidates, total), key=lambda c: c.error)
        raise BadInput(
            f"target=auto: no site stays within max_error={max_error:g}; the best has {best.error:.4f} ({best.short})"
        )
    if not budget:
        return within
    chosen, left = [], total
    for candidate in within:
        if total / left >= budget:
            break
        chosen.append(candidate)
        left -= candidate.saved
    if total / left < budget:
        raise BadInput(
            f"budget={budget:g}x cannot be met within max_error={max_error:g}: the {len(within)} sites make the UNet "
            f"{total / left:.2f} times cheaper"
        )
    return chosen


def table(candidates: list[Candidate], chosen: list[Candidate], total: int) -> str:
    """What was considered and chosen, for a person."""
    lines = [f"{'site':<8}{'attention GFLOP':>16}{'student GFLOP':>15}{'times faster':>14}{'pilot error':>13}  choice"]
    for c in candidates:
        kept = "attention, cheaper" if c.saved <= 0 else "attention" if c.worthwhile else "attention, faster"
        error = f"{c.error:.4f}" if c.worthwhile else "-"
        faster = f"{c.speedup:.2f}" if math.isfinite(c.speedup) else "-"
        costs = f"{c.attention / 1e9:>16.2f}{c.student / 1e9:>15.2f}{faster:>14}{error:>13}"
        lines.append(f"{c.short:<8}{costs}  {'student' if c in chosen else kept}")
    left = total - sum(c.saved for c in chosen)
    lines.append(f"whole UNet: {total / 1e9:.1f} -> {left / 1e9:.1f} GFLOP, {total / left:.2f} times cheaper")
    return "\n".join(lines)
