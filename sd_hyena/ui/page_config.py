"""Every option of the page's command: where files may be chosen from, where pictures go, who may come in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.command_line import option
from sd_hyena.options.rules import between

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class PageConfig:
    """The page: draw, drag regions, grow, compare and distil in a browser, on this machine."""

    model_dir: str = option(
        "", "folders whose models can be chosen, beside the one that ships", path=given_path.folders
    )
    student_dir: str = option("", "folders of students; those of TRAIN_DIR can be chosen too", path=given_path.folders)
    lora_dir: str = option("", "folders of LoRAs", path=given_path.folders)
    vae_dir: str = option("", "folders of VAEs", path=given_path.folders)
    embedding_dir: str = option("", "folders of textual inversions", path=given_path.folders)
    controlnet_dir: str = option("", "folders of ControlNets", path=given_path.folders)
    upscaler_dir: str = option("", "folders of upscaler models", path=given_path.folders)
    data_dir: str = option("", "folders of pictures and latents to train on", path=given_path.folders)
    preset_dir: str = option("", "where presets are saved; default: STATE_DIR/presets", path=given_path.folder)
    out_dir: str = option("outputs", "where the pictures go", "-o", path=given_path.folder)
    train_dir: str = option("out", "where trainings and their students go", path=given_path.folder)
    log_dir: str = option("logs", "their curves", "-l", path=given_path.folder)
    state_dir: str = option(
        "", "the page's own memory: last settings, small pictures; default: OUT_DIR/.page", path=given_path.folder
    )
    device: str = option("auto", "auto, cpu, cuda, mps: where the page draws unless it is told otherwise")
    port: int = option(7860, "where the page is: http://127.0.0.1:PORT; 0 takes a free one")
    listen: str = option("", "an address to be reached at from other machines, e.g. 0.0.0.0; needs --auth")
    auth: str = option("", "NAME:PASSWORD that is asked for, or a file that holds it")
    max_upload: int = option(64, "megabytes of one upload at most")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self):
        between(self, 0, 65535, "port")
        between(self, 1, 1 << 20, "max_upload")
        object.__setattr__(self, "state_dir", self.state_dir or str(Path(self.out_dir) / ".page"))
        object.__setattr__(self, "preset_dir", self.preset_dir or str(Path(self.state_dir) / "presets"))
        if self.listen and not self.auth:
            raise BadInput(f"listen={self.listen!r} lets other machines in; give --auth NAME:PASSWORD too")
        if self.auth:
            self.credentials  # noqa: B018

    @property
    def credentials(self) -> tuple[str, str] | None:
        """Name and password; None if nobody is asked. Raises BadInput."""
        text = self.auth
        if os.path.isfile(text):
            text = Path(text).read_text("utf-8").strip()
        name, colon, password = text.partition(":")
        if self.auth and not (name and colon and password):
            raise BadInput("auth must be NAME:PASSWORD, or a file that holds that; neither may be empty")
        return (name, password) if self.auth else None

    @property
    def address(self) -> str:
        return self.listen or LOOPBACK
