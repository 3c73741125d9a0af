"""python -m benchmarks.report.tables: write the tables of the documents anew from benchmarks/results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is there is replaced.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from benchmarks.harness.record import RESULTS
from benchmarks.report.plots import pixels, read

ROOT = RESULTS.parent.parent
DOCUMENTS = ("README.md", "docs/large-images.md", "docs/operator.md", "docs/performance.md")
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[dict[str, str]]
UNTRAINED = ", untrained"  # what such rows end with in the table of operators
STRESSED = {  # and how the table of sharper attention names some of them
    "block means, 256": "Nystromformer's block means, 256",
    "ToMe, 50 %": "ToMe, half of the tokens merged",
    "ToDo, 2x2": "ToDo, keys and values pooled 2x2",
    "HyperTile, 128 px": "windows of 16x16 (HyperTile, 128 px)",
}
OPERATORS = {
    "sdpa": "attention",
    "hyena2d, 256": "Hyena2d, 256 clusters",
    "clusters, 256, untrained": "256 clusters, untrained",
    "clusters, 64, untrained": "64 clusters, untrained",
    "hyena2d": "Hyena2d, 128 clusters",
    "hyena2d, 64": "Hyena2d, 64 clusters",
    "clusters, 256": "256 clusters alone, as in a trained file",
    "hyena2d, learned landmarks": "Hyena2d, 128 learned landmarks",
    "landmarks": "128 learned landmarks alone",
    "64 landmarks": "64 learned landmarks alone",
}
FASTEST = tuple(OPERATORS)[:4]  # what the short table has


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def _seconds(text: str) -> str:
    """Three digits, in the unit that suits."""
    value = float(text)
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _faster(row: dict[str, str]) -> str:
    return row["faster"].removesuffix("x").strip() or row["status"]


def _sizes(rows: Rows) -> list[str]:
    return sorted({row["size"] for row in rows}, key=lambda size: int(size.split("x")[0]))


def speed(rows: Rows) -> str:
    """The block of IN01 by size: attention, and what is the fastest beside it."""
    lines = []
    for size in _sizes(rows):
        found = {row["method"]: row for row in rows if row["size"] == size}
        times = [_seconds(found[name]["median"]) for name in FASTEST]
        ratios = [_faster(found[name]) for name in FASTEST[1:]]
        side, tokens = f"{pixels(found['sdpa'])} px", f"{int(found['sdpa']['tokens']):,}".replace(",", " ")
        pairs = zip(times[1:], ratios, strict=True)
        lines.append([side, tokens, times[0], *(cell for pair in pairs for cell in pair)])
    attention, *others = (OPERATORS[name] for name in FASTEST)
    head = ["image", "tokens", attention, *(cell for name in others for cell in (name, "times faster"))]
    return _markdown(head, lines)


def methods(rows: Rows) -> str:
    """Every method at every size: the median, and how many times faster than attention."""
    sizes = _sizes(rows)
    cells = {(row["method"], row["size"]): row for row in rows}
    names = dict.fromkeys(row["method"] for row in rows)
    lines = []
    for name in names:
        line = [OPERATORS.get(name, name)]
        for size in sizes:
            row = cells.get((name, size))
            line.append(
                f"{_seconds(row['median'])} ({_faster(row)})" if row and row["median"] else row["status"] if row else ""
            )
        lines.append(
            [*line, cells[name, sizes[-1]]["note"].removeprefix("time grows as ") if (name, sizes[-1]) in cells else ""]
        )
    return _markdown(["method", *(f"{size.split('x')[0]} px" for size in sizes), "grows as"], lines)


def memory(rows: Rows) -> str:
    """MiB above what was held before."""
    sizes = _sizes(rows)
    cells = {(row["method"], row["size"]): row for row in rows}
    cell = lambda r: f"{r['allocated (MiB)']} ({r['note']})" if r["allocated (MiB)"] else r["status"]
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        found = [cells.get((name, size)) for size in sizes]
        lines.append([OPERATORS.get(name, name), *(cell(row) if row else "" for row in found)])
    return _markdown(["method", *(f"{size.split('x')[0]} px" for size in sizes)], lines)


def unet(rows: Rows) -> str:
    """A step: measured beside predicted."""
    steps = [row for row in rows if row["method"] == "step" and row["median"]]
    lines = [
        [f"{pixels(row)} px", row["site"], _seconds(row["median"]), f"{float(row['ratio']):.2f}", row["predicted"]]
        for row in steps
    ]
    return _markdown(["image", "students", "a step", "times faster", "predicted from operations"], lines)


def ladder(rows: Rows) -> str:
    """Each rung with attention and with students."""
    cell = lambda row: _seconds(row["median"]) if row["median"] else row["status"].split(":")[0]
    lines = []
    for model in dict.fromkeys(row["ckpt_id"] for row in rows):
        own = [row for row in rows if row["ckpt_id"] == model]
        for rung in dict.fromkeys(row["method"] for row in own):
            found = {row["site"]: row for row in own if row["method"] == rung}
            times = [cell(found[site]) if site in found else "" for site in dict.fromkeys(row["site"] for row in rows)]
            error = max((row["error"] for row in found.values() if row["error"]), key=float, default="")
            first = next(iter(found.values()))
            lines.append([f"{model}, {pixels(first)} px", rung, *times, error, first["note"]])
    return _markdown(["model", "step of --optimize", "attention", "students", "error", "compiled in"], lines)


def image(rows: Rows) -> str:
    """Sampling and the VAE of the shipped model."""
    sizes = _sizes(rows)
    cells = {(row["method"], row["size"]): row for row in rows}
    lines = [
        [
            name,
            *(
                _seconds(cells[name, size]["median"]) if cells[name, size]["median"] else cells[name, size]["status"]
                for size in sizes
            ),
        ]
        for name in dict.fromkeys(row["method"] for row in rows)
    ]
    return _markdown(["part", *(f"{size.split('x')[0]} px" for size in sizes)], lines)


def quality(rows: Rows) -> str:
    """Students trained alike, the best first: of several seeds the median and, in brackets, the least and the most. Beside
    them what is known of them untrained where all logits are larger."""
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["student"], []).append(row)
    sharper = {row["untrained"]: row for row in read(RESULTS / "sharpness.csv")}
    lines = []
    for student, seeds in sorted(found.items(), key=lambda item: median(float(row["prediction"]) for row in item[1])):
        bare = student.removesuffix(UNTRAINED)
        stress = sharper.get(STRESSED.get(bare, bare), {}) if bare != student else {}
        lines.append([
            student,
            seeds[0]["steps"],
            str(len(seeds)),
            *(_range(seeds, name, _short) for name in ("prediction", "as_noise", "guided_5")),
            *(_range(seeds, name, lambda value: f"{float(value):.1f}") for name in ("psnr_median", "psnr_mean")),
            _range(seeds, "ssim", lambda value: f"{float(value):.3f}".removeprefix("0")),
            *(_short(stress[name]) if stress else "" for name in ("IN01_x2", "IN01_x4")),
            seeds[0]["gflop_2048"],
        ])  # fmt: skip
    head = ["student", "steps", "seeds", "prediction", "as noise", "guided at 5", "PSNR dB, median", "mean", "SSIM"]
    return _markdown([*head, "IN01 ×2, untrained", "×4", "GFLOP at 2048 px"], lines)


def _range(rows: Rows, name: str, shown: Callable[[str], str]) -> str:
    """The median of the rows, and the least and the most if there are several."""
    values = [float(row[name]) for row in rows]
    middle, least, most = (shown(str(value)) for value in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({least} to {most})"


def students(rows: Rows) -> str:
    """What stands in for attention, held to the teacher: sizes, scales of guidance, pictures."""
    lines = [
        [
            row["students"],
            f"{row['size'].replace('x', ' x ')}, {row['guidance']}",
            row["images"],
            *(_short(row[name]) for name in ("prediction", "guided")),
            ", ".join(f"{float(row[f'psnr_{name}']):.1f}" for name in ("median", "mean", "min")),
            f"{float(row['ssim_mean']):.3f}".removeprefix("0"),
            f"{100 * float(row['share_above_20_dB']):.0f} %",
            f"{row['teacher_right']}, {row['student_right']}",
        ]
        for row in rows
    ]
    head = ["students", "px, guidance", "pictures", "prediction", "guided", "PSNR dB: median, mean, least"]
    return _markdown([*head, "SSIM", "above 20 dB", "captions right: teacher, student"], lines)


def headline(rows: Rows) -> str:
    """Of these the model's own size at the usual guidance, in few columns."""
    lines = [
        [
            f"{row['students']} (`-y {row['file']}`)" if len(row["file"]) < 40 else row["students"],
            *(_short(row[name]) for name in ("prediction", "guided")),
            f"**{float(row['psnr_median']):.1f} dB**",
            f"{float(row['ssim_mean']):.3f}".removeprefix("0"),
            f"{100 * float(row['share_above_20_dB']):.0f} %",
        ]
        for row in rows
        if (row["size"], row["guidance"]) == ("256x256", "5")
    ]
    names = ["what stands in for attention", "error of the prediction", "guided at 5", "PSNR, median", "SSIM"]
    return _markdown([*names, "above 20 dB"], lines)


def sharpness(rows: Rows) -> str:
    """What needs no training, at two sites, with all logits multiplied."""
    columns = [f"{site}_x{factor}" for site in ("IN01", "OUT09") for factor in (1, 2, 4)]
    lines = [[row["untrained"], *(_short(row[name]) for name in columns), row["gflop_2048"]] for row in rows]
    heads = [name.replace("_x", " ×") for name in columns]
    return _markdown(["untrained", *heads, "GFLOP at 2048 px"], lines)


def sharp_training(rows: Rows) -> str:
    """What training makes of students, at two sites, with all logits multiplied."""
    cells = {(row["student"], row["site"], row["factor"]): row for row in rows}
    columns = list(dict.fromkeys((row["site"], row["factor"]) for row in rows))
    names = list(dict.fromkeys(row["student"] for row in rows))
    lines = [["untrained", *(_short(cells[names[0], *column]["untrained"]) for column in columns)]]
    lines += [[name, *(_short(cells[name, *column]["trained"]) for column in columns)] for name in names]
    return _markdown(["student", *(f"{site} ×{factor}" for site, factor in columns)], lines)


def landmarks(rows: Rows) -> str:
    """How the error of untrained clusters falls with their number, by tokens."""
    tokens, counts = (sorted({int(row[name]) for row in rows}) for name in ("tokens", "landmarks"))
    cells = {
        (int(row["tokens"]), int(row["landmarks"])): f"{_short(row['IN01'])}, {_short(row['OUT09'])}" for row in rows
    }
    lines = [[f"{n:,}".replace(",", " "), *(cells[n, m] for m in counts)] for n in tokens]
    return _markdown(["tokens", *(f"{m} clusters" for m in counts)], lines)


def _short(error: str) -> str:
    """Two digits that count, without the leading zero."""
    value = float(error)
    return (
        "0"
        if not value
        else f"{value:.1e}"
        if value < 1e-4
        else f"{value:.5f}".rstrip("0").removeprefix("0")
        if value < 1
        else f"{value:.2f}"
    )


def _vae(rows: Rows, ways: dict[str, str], cell: str) -> str:
    """`cell` of each way, named by `mode` and `offload`, by size."""
    sizes = list(dict.fromkeys(row["pixels"] for row in rows))
    cells = {(f"{row['mode']} {row['offload']}".strip(), row["pixels"]): row for row in rows}
    blank = dict.fromkeys(rows[0], "")
    lines = [
        [shown, *(cell.format_map(cells.get((way, size), blank)).strip(", ") for size in sizes)]
        for way, shown in ways.items()
    ]
    return _markdown(["encode, decode", *(f"{size} px" for size in sizes)], lines)


def vae_error(rows: Rows) -> str:
    """Distance of each way to tile from the untiled VAE, at the sizes where all were run."""
    ways = {
        "exact cpu": "exact",
        "two_pass cpu": "two_pass, LargeResPatch's",
        "fast cpu": "fast",
        "classic cpu": "classic, Tiled VAE's way",
        "blend cpu": "blend, diffusers' own",
    }
    all_run = {row["pixels"] for row in rows if row["mode"] == "blend"}
    return _vae([row for row in rows if row["pixels"] in all_run], ways, "{encode_rms}, {decode_rms}")


def vae_memory(rows: Rows) -> str:
    """Peak memory of the exact VAE in MiB by where whole maps wait; above 2048 px of decoding alone."""
    ways = {"untiled": "untiled", "exact none": "on the device", "exact cpu": "RAM", "exact disk": "disk"}
    large = [row for row in rows if int(row["pixels"]) >= 1024]
    return _vae(large, ways, "{encode_MiB}, {decode_MiB}")


def options(rows: Rows) -> str:
    """What each option for large images costs and saves in a step: of plain's time, MiB, distance to plain, by size."""
    sizes = list(dict.fromkeys(row["pixels"] for row in rows))
    cells = {(row["option"], row["pixels"]): row for row in rows}

    def cell(option: str, size: str) -> str:
        row = cells[option, size]
        cost = _seconds(row["s"]) if option == "plain" else f"x {float(row['of_plain']):.2f}"
        return f"{cost}, {row['MiB']}, {row['distance']}"

    lines = [
        [option, *(cell(option, size) for size in sizes)] for option in dict.fromkeys(row["option"] for row in rows)
    ]
    return _markdown(["a step", *(f"{size} px" for size in sizes)], lines)


def inversion(rows: Rows) -> str:
    """How much of a picture stays, by the noise that it is drawn again from."""
    strengths = list(dict.fromkeys(row["strength"] for row in rows))
    cells = {(row["start"], row["strength"]): f"{row['psnr_dB']} dB, {row['ssim']}" for row in rows}
    lines = [[start, *(cells[start, s] for s in strengths)] for start in dict.fromkeys(row["start"] for row in rows)]
    return _markdown(["start", *(f"strength {s}" for s in strengths)], lines)


def grow(rows: Rows) -> str:
    """Of each way to draw a size: how many pictures are right, how sharp, how long, and how near students are."""
    found: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        if row["method"] != "plain" or row["size"] != "256x256":
            found.setdefault((row["size"], row["method"], row["by"], row["canvas"]), []).append(row)
    lines = []
    sides = lambda way: [int(side) for side in way[0][0].split("x")]
    for (size, method, by, canvas), same in sorted(found.items(), key=sides):
        middle = lambda name, same=same: median([float(row[name]) for row in same if row[name]] or [0.0])
        share = f"{sum(int(row['right']) for row in same)} of {len(same)}"
        psnr = middle("psnr_dB")
        named = f"{method} in tiles" if canvas == "tiles" else method
        took = f"{middle('seconds'):.0f} s" if by else ""
        lines.append([size, named, by, share, f"{middle('sharpness'):.2f}", took, f"{psnr:.1f} dB" if psnr else ""])
    return _markdown(["px", "way", "by", "right", "sharpness", "CPU time", "to attention"], lines)


def operations(rows: Rows) -> str:
    """Of a plain drawing and of a grown one, with attention and with students."""
    names = [name for name in rows[0] if name not in ("layout", "px")]
    lines = [[row["layout"], row["px"], *(row[name] for name in names)] for row in rows]
    return _markdown(["layout", "px", *names], lines)


TABLES: dict[str, tuple[str, Callable[[Rows], str], str]] = {  # the CSV, the table's form, the plot below it
    "speed": ("cpu", speed, "time"),
    "methods": ("cpu", methods, ""),
    "methods_bfloat16": ("cpu_bfloat16", methods, ""),
    "core": ("core_cpu", methods, ""),
    "memory": ("memory_cpu", memory, "memory"),
    "unet": ("unet_cpu", unet, "sites"),
    "unet_bfloat16": ("unet_cpu_bfloat16", unet, "sites"),
    "ladder": ("ladder_cpu", ladder, ""),
    "image": ("image_cpu", image, ""),
    "quality": ("quality", quality, ""),
    "students": ("students", students, ""),
    "headline": ("students", headline, ""),
    "sharpness": ("sharpness", sharpness, ""),
    "landmarks": ("landmarks", landmarks, ""),
    "sharp_training": ("sharp_training", sharp_training, ""),
    "vae_error": ("tiled_vae", vae_error, ""),
    "vae_memory": ("tiled_vae", vae_memory, "memory"),
    "options_tiny_sd": ("large_images_tiny_sd", options, ""),
    "options_sd15": ("large_images_sd15", options, ""),
    "grow": ("grow", grow, ""),
    "growing_operations": ("growing_operations", operations, ""),
    "inversion": ("noise_inversion", inversion, ""),
}


def table(name: str, folder: Path) -> str:
    """A table in Markdown with its plot, for a document in `folder`, and below it where, when and by which command its
    figures were measured; of a quick run if there is no other."""
    stem, form, plot = TABLES[name]
    stem = stem if (RESULTS / f"{stem}.csv").exists() else f"{stem}_quick"
    if not (RESULTS / f"{stem}.csv").exists():
        return "\nNot measured yet.\n\n"
    facts = json.loads((RESULTS / f"{stem}.json").read_text())
    source = (
        f"`{facts['command']}`, {facts['hardware']}, torch {facts['torch']}, commit {facts['commit']}, {facts['date']}"
    )
    if "students" in facts:
        source += f"; students: {facts['students']}"
    picture = Path(os.path.relpath(RESULTS / f"{stem}_{plot}.png", folder)).as_posix()
    return f"\n{form(read(RESULTS / f'{stem}.csv'))}\n{source}.\n\n" + (f"![{name}]({picture})\n\n" if plot else "")


def renewed(path: Path) -> str:
    """A document's text with all its tables made anew."""
    return BLOCK.sub(lambda found: found[1] + table(found[2], path.parent) + found[3], path.read_text("utf-8"))


if __name__ == "__main__":
    for name in DOCUMENTS:
        path = ROOT / name
        text = renewed(path)
        if text != path.read_text("utf-8"):
            path.write_text(text, "utf-8")
            print(name)
