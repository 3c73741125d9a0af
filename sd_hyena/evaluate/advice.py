"""At which sizes a site is better kept as attention."""

from __future__ import annotations

from typing import Any

WORSE = 1.5  # times the error at the first size, from which a size needs attention, or training of its own


def advice(measured: dict[str, dict[str, Any]]) -> list[str]:
    """Where a site is better kept as attention: where it is the faster one, or where the prediction suffers."""
    lines, first = [], next(iter(measured.values()))["prediction"]["both"]
    for size, found in measured.items():
        slow = [site for site, row in found["sites"].items() if row["student_ms"] > row["attention_ms"]]
        if slow:
            lines.append(f"{size}: attention is faster at {' '.join(slow)}; keep it there")
        ratio = found["prediction"]["both"] / max(first, 1e-12)
        if ratio > WORSE:
            lines.append(
                f"{size}: the prediction's error is {ratio:.1f} times that of the first size; keep attention, or train there"
            )
    return lines or ["at no size measured is attention the better choice"]
