"""The report of an evaluation: JSON, Markdown, contact sheets, plots, and the same in TensorBoard."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from sd_hyena.files.atomic import replacing
from sd_hyena.files.comparison import side_by_side
from sd_hyena.files.names import for_a_shell
from sd_hyena.options.typed import portable_command
from sd_hyena.processes.ranks import say
from sd_hyena.students.checkpoint import versions

SHOWN = 6  # images of a contact sheet
SIDE = 256  # their height in pixels, at most


class Report:
    """Collects what was measured of each alternative and writes it to a folder."""

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self.folder = folder
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        if torch.cuda.is_available():
            machine += f", {torch.cuda.get_device_name()}"
        self.content: dict[str, Any] = {
            **facts, "command": portable_command(), "machine": machine, "versions": versions(), "students": {}
        }  # fmt: skip
        self.sheets: dict[str, np.ndarray] = {}

    def picture(self, label: str, size: tuple[int, int], rows: list) -> None:
        """A contact sheet: for each scale of guidance a row of teacher | student | difference."""
        lines = []
        for scale, teacher, student in rows:
            for a, b in list(zip(teacher, student, strict=True))[:SHOWN]:
                lines.append((scale, side_by_side(a, b)))
        shown = [_small(line) for _, line in lines]
        sheet = Image.fromarray(np.concatenate(shown, axis=0))
        pen, y = ImageDraw.Draw(sheet), 0
        for (scale, _), line in zip(lines, shown, strict=True):
            pen.text((4, y + 2), f"guidance {scale:g}", fill="white", stroke_width=2, stroke_fill="black")
            y += len(line)
        name = f"{_file_name(label)}-{size[0]}x{size[1]}"
        sheet.save(self.folder / f"{name}.png")
        self.sheets[name] = np.asarray(sheet)

    def add(self, label: str, measured: dict[str, Any], advice: list[str]) -> None:
        """What is known of an alternative so far; on disk at once, since large sizes take long."""
        self.content["students"][label] = {"sizes": measured, "advice": advice}
        with replacing(self.folder / "report.json") as temporary:
            temporary.write_text(json.dumps(self.content, indent=1) + "\n", "utf-8")
        with replacing(self.folder / "report.md") as temporary:
            head = "\n".join(f"- {name}: {self.content[name]}" for name in ("model", "command", "machine"))
            temporary.write_text(f"# Evaluation\n\n{head}\n\n{markdown(self.content['students'])}\n", "utf-8")

    def finish(self) -> None:
        """Draw the plots, write everything for TensorBoard, and tell."""
        self._tensorboard(self._plots())
        for label, entry in self.content["students"].items():
            say("\n".join(f"{label}: {line}" for line in entry["advice"]))
        say(
            f"\nreport: {self.folder}/report.md, pictures beside it; watch: tensorboard --logdir {for_a_shell(self.folder)}"
        )

    def _plots(self) -> dict[str, np.ndarray]:
        """Error against timestep of each site, a figure per alternative, a line per size."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        images = {}
        for label, entry in self.content["students"].items():
            sites = list(next(iter(entry["sizes"].values()))["sites"])
            figure, axes = pyplot.subplots(1, len(sites), figsize=(3 * len(sites), 3), squeeze=False, sharey=True)
            for axis, site in zip(axes[0], sites, strict=True):
                for size, found in entry["sizes"].items():
                    bins = {name: value for name, value in found["sites"][site].items() if name.startswith("t")}
                    axis.semilogy([name[1:] for name in bins], list(bins.values()), marker="o", label=size)
                axis.set_title(site)
                axis.set_xlabel("timestep")
            axes[0][0].set_ylabel("relative error")
            axes[0][-1].legend()
            figure.tight_layout()
            figure.canvas.draw()
            name = f"{_file_name(label)}-errors"
            figure.savefig(self.folder / f"{name}.png", dpi=110)
            images[name] = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
            pyplot.close(figure)
        return images

    def _tensorboard(self, plots: dict[str, np.ndarray]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(self.folder)) as writer:
            for name, picture in (self.sheets | plots).items():
                writer.add_image(name, picture, dataformats="HWC")
            writer.add_text("report", markdown(self.content["students"]))


def _small(line: np.ndarray) -> np.ndarray:
    h, w = line.shape[:2]
    if h <= SIDE:
        return line
    return np.asarray(Image.fromarray(line).resize((w * SIDE // h, SIDE), Image.Resampling.LANCZOS))


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)[:80] or "students"


def markdown(students: dict[str, Any]) -> str:
    """Tables of what was measured of each alternative."""
    lines = []
    for label, entry in students.items():
        first = next(iter(entry["sizes"].values()))
        lines += [
            f"## {label}",
            "",
            "| size | " + " | ".join(first["sites"]) + " | prediction | as noise | guided | block times |",
        ]
        lines += ["|" + "---|" * (len(first["sites"]) + 5)]
        for size, found in entry["sizes"].items():
            errors = [f"{row['relative_mse']:.2g}" for row in found["sites"].values()]
            guided = ", ".join(
                f"{name.removeprefix('guided_')}: {value:.2g}"
                for name, value in found["prediction"].items()
                if name.startswith("guided_")
            )
            a, s = (sum(row[f"{who}_ms"] for row in found["sites"].values()) for who in ("attention", "student"))
            errors += [f"{found['prediction'][name]:.2g}" for name in ("both", "as_noise")]
            lines.append(f"| {size} | {' | '.join(errors)} | {guided} | {a:.1f} → {s:.1f} ms |")
        soft = {name: f"{row['entropy']:.2f}" for name, row in first["sites"].items() if "entropy" in row}
        if soft:
            said = " ".join(f"{name} {share}" for name, share in soft.items())
            lines += [
                "",
                f"How sharp the attention is, as its entropy's share of the largest there is (1: even): {said}",
            ]
        names = list(dict.fromkeys(n for f in entry["sizes"].values() for row in f["images"].values() for n in row))
        lines += ["", "| size | guidance | " + " | ".join(n.replace("_", " ") for n in names) + " |"]
        lines += ["|" + "---|" * (len(names) + 2)]
        for size, found in entry["sizes"].items():
            for scale, row in found["images"].items():
                cells = [f"{row[n]:.4g}" if n in row else "" for n in names]
                lines.append(f"| {size} | {scale} | {' | '.join(cells)} |")
        lines += ["", *(f"- {line}" for line in entry["advice"]), ""]
    return "\n".join(lines)
