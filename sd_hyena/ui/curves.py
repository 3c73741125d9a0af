"""The curves of a training as a small drawing, and its newest pictures, read from what the run itself writes."""

from __future__ import annotations

import base64
import csv
import math
from collections import defaultdict
from html import escape
from pathlib import Path

WIDTH, HEIGHT, MARGIN = 640, 220, 48
MOST = 300  # points of a line
COLOURS = ("#f97316", "#3b82f6", "#22c55e", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#64748b")
Curve = list[tuple[int, float]]


def curves_of(folder: Path) -> dict[str, Curve]:
    """Every column of a run's CSV files by step; a step that was done again counts as it was done last."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.glob("csv-*/metrics.csv")):
        try:
            with open(path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    step = int(float(row.pop("step") or 0))
                    for name, value in row.items():
                        if name and value:
                            found[name][step] = float(value)
        except (OSError, ValueError, KeyError):  # a line that is being written
            continue
    return {name: sorted(points.items()) for name, points in found.items()}


def chart(title: str, curves: dict[str, Curve]) -> str:
    """Lines over steps on a logarithmic scale, as SVG; empty without a point."""
    points = {
        name: [(x, math.log10(y)) for x, y in curve if y > 0 and math.isfinite(y)] for name, curve in curves.items()
    }
    points = {name: curve for name, curve in points.items() if curve}
    if not points:
        return ""
    every = [point for curve in points.values() for point in curve]
    last = max(x for x, _ in every) or 1
    low, high = min(y for _, y in every), max(y for _, y in every)
    low, high = math.floor(low * 2) / 2, max(math.ceil(high * 2) / 2, math.floor(low * 2) / 2 + 0.5)
    at = lambda x, y: (
        MARGIN + (WIDTH - MARGIN - 8) * x / last,
        HEIGHT - 24 - (HEIGHT - 48) * (y - low) / (high - low),
    )
    parts = [f"<text x='{MARGIN}' y='14' font-weight='600'>{escape(title)}</text>"]
    ticks = [low + (high - low) * i / 2 for i in range(3)]
    for tick in ticks:
        _, y = at(0, tick)
        parts.append(f"<line x1='{MARGIN}' x2='{WIDTH - 8}' y1='{y:.1f}' y2='{y:.1f}' stroke-opacity='.25'/>")
        parts.append(f"<text x='{MARGIN - 4}' y='{y + 4:.1f}' text-anchor='end'>{10**tick:.2g}</text>")
    for x in (0, last):
        parts.append(f"<text x='{at(x, low)[0]:.1f}' y='{HEIGHT - 8}' text-anchor='middle'>{x}</text>")
    for i, (name, curve) in enumerate(points.items()):
        colour = COLOURS[i % len(COLOURS)]
        thin = curve[:: max(1, len(curve) // MOST)] + curve[-1:]
        line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in thin)
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='2'/>")
        if len(curve) < 30:
            parts += [
                "<circle cx='{:.1f}' cy='{:.1f}' r='3' fill='{}' stroke='none'/>".format(*at(*p), colour) for p in curve
            ]
        parts.append(
            f"<text x='{WIDTH - 10}' y='{14 + 13 * i}' text-anchor='end' fill='{colour}'>{escape(name)} {10 ** curve[-1][1]:.3g}</text>"
        )
    return (
        f"<svg class='curves' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title, True)}' font-size='11' "
        f"stroke='currentColor' stroke-width='1'><g fill='currentColor' stroke='currentColor'>"
        + "".join(part.replace("<text", "<text stroke='none'") for part in parts)
        + "</g></svg>"
    )


def charts(folder: Path) -> str:
    """What a run's curves are: the errors of its sites, and their losses."""
    curves = curves_of(folder)
    below = lambda prefix: {
        name.removeprefix(prefix): curve for name, curve in curves.items() if name.startswith(prefix)
    }
    return chart("relative error, held out", below("val/relative_mse/")) + chart("loss", below("train/loss/"))


def pictures_of(folder: Path) -> dict[str, str]:
    """The newest picture of each kind in a run's event files, as data URLs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 1, "tensors": 1, "histograms": 1})
    events.Reload()
    found = {}
    for tag in events.Tags()["images"]:
        seen = events.Images(tag)[-1]
        found[f"{tag} (step {seen.step})"] = (
            "data:image/png;base64," + base64.b64encode(seen.encoded_image_string).decode()
        )
    return found
