"""python -m benchmarks.report.plots: draw the tables of benchmarks/results again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

from benchmarks.harness.record import RESULTS

WIDE = (10, 5.6)  # inches


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def pixels(row: dict[str, str]) -> int:
    """The longer side."""
    return max(int(side) for side in row["size"].split("x"))


def draw(path: Path) -> list[Path]:
    """The plots of a suite's CSV, beside it; none for a table of another kind or with nothing to draw."""
    drawn = []
    rows = read(path)
    for kind, plot in PLOTS.get(path.stem.split("_")[0], {}).items():
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=WIDE, layout="constrained")
        if plot(axes, rows):
            target = path.with_name(f"{path.stem}_{kind}.png")
            figure.savefig(target, dpi=90, metadata={"Software": None})
            drawn.append(target)
        pyplot.close(figure)
    return drawn


def _lines(axes, rows: Iterable[dict[str, str]], column: str, label: Callable[[dict[str, str]], str]) -> bool:
    """`column` against the side in pixels, a line for each label, both axes logarithmic."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row[column] and ", twin" not in row["method"]:
            lines.setdefault(label(row), []).append((pixels(row), float(row[column])))
    if not lines:
        return False
    for name, points in lines.items():
        style = {"color": "black", "linewidth": 2.5} if name.startswith("sdpa") and name.count(" ") < 2 else {}
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name, **style)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set(xscale="log", yscale="log", xlabel="image side in pixels")
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    return True


def _first_site(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["site"] == rows[0]["site"]]


def _time(axes, rows: list[dict[str, str]]) -> bool:
    axes.set(title=f"{rows[0]['tag']}, {rows[0]['site']}, {rows[0]['dtype']}, batch {rows[0]['batch_size']}")
    axes.set_ylabel("median seconds")
    return _lines(axes, _first_site(rows), "median", lambda row: row["method"])


def _memory(axes, rows: list[dict[str, str]]) -> bool:
    axes.set(title=f"peak above what was held before, {rows[0]['site']}, {rows[0]['dtype']}", ylabel="MiB")
    return _lines(axes, _first_site(rows), "allocated (MiB)", lambda row: row["method"])


def _speedup(axes, rows: list[dict[str, str]]) -> bool:
    """Measured and predicted, side by side, for each set of students and size."""
    bars = [row for row in rows if row["ratio"] and row["method"] == "step" and row["predicted"]]
    at = range(len(bars))
    axes.bar([x - 0.2 for x in at], [float(row["ratio"]) for row in bars], 0.4, label="measured")
    axes.bar([x + 0.2 for x in at], [float(row["predicted"]) for row in bars], 0.4, label="predicted from operations")
    axes.set_xticks(list(at), [f"{row['site']}\n{row['size']}" for row in bars])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="times as fast as with attention", title="a step of Stable Diffusion 1.5's UNet")
    axes.legend()
    return bool(bars)


def _stacked(axes, rows: list[dict[str, str]]) -> bool:
    """Seconds of a step: the sites' blocks one on another, and what is left."""
    steps: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["median"] and row["method"].startswith("site"):
            steps.setdefault(f"{row['note']}\n{row['size']}", {})[row["site"]] = float(row["median"])
        elif row["median"] and row["method"] == "step":
            steps.setdefault(f"{row['site']}\n{row['size']}", {})["all"] = float(row["median"])
    for step in steps.values():
        step["rest"] = step.pop("all") - sum(value for key, value in step.items() if key != "all")
    bottoms = [0.0] * len(steps)
    for name in dict.fromkeys(name for step in steps.values() for name in step):
        heights = [step.get(name, 0.0) for step in steps.values()]
        color = {"color": "lightgrey"} if name == "rest" else {}
        axes.bar(list(steps), heights, bottom=bottoms, label=name, **color)
        bottoms = [low + height for low, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="seconds", title="a step of Stable Diffusion 1.5's UNet, site by site")
    axes.legend(fontsize="x-small", ncols=2)
    return bool(steps)


def _ladder(axes, rows: list[dict[str, str]]) -> bool:
    bars = [row for row in rows if row["median"]]
    names = [f"{row['method']}, {row['site']}, {row['size']}" for row in bars]
    axes.barh(names[::-1], [float(row["median"]) for row in bars][::-1])
    axes.set(xlabel="median seconds of a step", title="--optimize, one more at each rung")
    return bool(bars)


def _tiled_vae(axes, rows: list[dict[str, str]]) -> bool:
    """Of decoding, where the untiled VAE and the exact one with its usual tiles were run."""
    axes.set(title="decoding, peak above the model and its input", ylabel="MiB")
    exact = [row for row in rows if row["mode"] in ("untiled", "exact") and row["tile"] == rows[-1]["tile"]]
    named = [row | {"size": row["pixels"], "method": f"{row['mode']} {row['offload']}".strip()} for row in exact]
    return _lines(axes, named, "decode_MiB", lambda row: row["method"])


PEER, OURS = "", "Hyena2d, 200 steps at one rate"
TRAINED = {  # rows of benchmarks.quality -> methods of the cpu suite, and the line they belong to
    "Hyena2d, the default": ("hyena2d", OURS),
    "64 clusters": ("hyena2d, 64", OURS),
    "256 clusters": ("hyena2d, 256", OURS),
    "256 clusters, projections at a tenth of the rate": ("hyena2d, 256", "Hyena2d, projections at a tenth of it"),
    "256 clusters alone": ("clusters, 256", "clusters alone, 200 steps at one rate"),
    "256 clusters alone, projections at a tenth of the rate": (
        "clusters, 256",
        "clusters alone, projections at a tenth",
    ),
    "linear attention (LinFusion's form)": ("linear attention", PEER),
    "Hyena-SE as Grafting has it": ("Hyena-SE, raster", PEER),
    "Hyena-SE over the plane": ("Hyena-SE, plane", PEER),
    "ancestor's operator on real activations": ("safari, published", PEER),
    "pointwise MLP": ("pointwise", PEER),
}


def _frontier(axes, rows: Iterable[dict[str, str]]) -> bool:
    """PSNR of pictures, the median of seeds, against the time of a block at 1024 px, a point for each method; attention's
    time is a line."""
    from matplotlib.ticker import LogLocator, ScalarFormatter

    times = {
        row["method"]: float(row["median"])
        for row in read(RESULTS / "cpu.csv")
        if pixels(row) == 1024 and row["median"]
    }
    seeds: dict[str, list[float]] = {}
    for row in rows:
        seeds.setdefault(row["student"], []).append(float(row["psnr_median"]))
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for name, found in seeds.items():
        untrained = name, "clusters, untrained" if name.startswith("clusters") else PEER  # has one name in both tables
        method, line = TRAINED.get(name, untrained)
        if method in times:
            lines.setdefault(line or name, []).append((1e3 * times[method], median(found), name))
    if not lines:
        return False
    for line, points in lines.items():
        ours = "cluster" in line or "Hyena2d" in line
        style = {"linewidth": 2, "markersize": 8} if ours else {"linewidth": 0, "markersize": 7, "alpha": 0.8}
        hollow = {"markerfacecolor": "none"} if "untrained" in line else {}
        xs, ys, names = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o" if ours else "s", label=line, **style, **hollow)
        for x, y, name in zip(xs, ys, names, strict=True):
            if ours:
                m = next((word.strip(",") for word in name.split() if word.strip(",").isdigit()), "128")
                axes.annotate(m, (x, y), textcoords="offset points", xytext=(6, -10), fontsize="x-small")
    axes.axvline(1e3 * times["sdpa"], color="black", linestyle=":", label="attention")
    axes.set(
        xscale="log",
        xlabel="ms of a block at 1024 px (SD 1.5's IN01, one thread)",
        ylabel="PSNR to the teacher, dB, median",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2, loc="center right", bbox_to_anchor=(0.9, 0.6))
    return True


PLOTS = {
    "quality": {"frontier": _frontier},
    "core": {"time": _time, "memory": _memory},
    "block": {"time": _time, "memory": _memory},
    "cpu": {"time": _time},
    "memory": {"memory": _memory},
    "unet": {"speedup": _speedup, "sites": _stacked},
    "image": {"time": _time},
    "ladder": {"time": _ladder},
    "tiled": {"memory": _tiled_vae},
}


if __name__ == "__main__":
    for table in sorted(RESULTS.glob("*.csv")):
        for picture in draw(table):
            print(picture.name)
