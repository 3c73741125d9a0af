"""What the page keeps between two clicks: the worker, the pictures, the last settings, the presets."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import os
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from sd_hyena.errors import BadInput
from sd_hyena.files.atomic import replacing
from sd_hyena.files.yaml_file import read_documents
from sd_hyena.options.command_line import from_dict, to_dict, with_paths
from sd_hyena.options.from_image import OURS_ALONE
from sd_hyena.options.generate_config import GenerateConfig
from sd_hyena.options.prompt_lines import is_file_of_prompts
from sd_hyena.options.shipped import CONFIGS
from sd_hyena.ui import region_editor
from sd_hyena.ui.album import Album
from sd_hyena.ui.folders import Folders
from sd_hyena.ui.job import Drawing, Picture
from sd_hyena.ui.leftovers import tidy
from sd_hyena.ui.page_config import PageConfig
from sd_hyena.ui.worker import Worker

HIDDEN = (*OURS_ALONE, "name_format", "compare", "regions", "mask")  # said elsewhere on the page, or by its command
RATES = "rates.yaml"  # operations a second, by model and what they depend on
SPEED = ("device", "dtype", "offload", "optimize")  # what operations a second depend on
PAINTED = re.compile(r"data:image/png;base64,([A-Za-z0-9+/=]+)")


class Session:
    """One for all pages of a server: whoever opens the page finds what is going on."""

    def __init__(self, config: PageConfig):
        self.config = config
        self.state, self.presets_folder = Path(config.state_dir), Path(config.preset_dir)
        self.uploads = self.state / "uploads"
        for folder in (self.state, self.uploads, Path(config.out_dir)):
            folder.mkdir(parents=True, exist_ok=True)
        self.folders, self.album, self.worker = Folders(config), Album(self.state / "small"), Worker()
        self._writing = threading.Lock()
        self._loaded: tuple = ()

    @property
    def own(self) -> dict[str, Any]:
        """Options that the page's command has decided."""
        names = {f.name for f in dataclasses.fields(GenerateConfig)}
        decided = {"out_dir", *(name for name in names if name.endswith("_dir"))}
        return {name: value for name, value in vars(self.config).items() if name in decided & names}

    def order(self, options: Mapping[str, Any], regions: str | None = "", mask: str | None = "") -> GenerateConfig:
        """The config of options as the form has them. Raises BadInput; nothing is loaded for it."""
        given = dict(options) | self.own
        if path := region_editor.written(regions, self.state / "regions"):
            given["regions"] = path
        if mask:
            given["mask"] = self._painted(mask)
        return self.checked(given)

    def checked(self, given: Mapping[str, Any]) -> GenerateConfig:
        """A config, once all that it names was looked at and lies in the page's folders. Raises BadInput."""
        if is_file_of_prompts(given.get("prompt")):
            raise BadInput("prompt: @FILE is generate.py's; a prompt that begins with @ needs a blank before it")
        config = from_dict(GenerateConfig, dict(given))
        self.folders.check(config, [self.uploads, CONFIGS])  # before any of it is read
        config = with_paths(config)
        self.folders.check(config, [self.uploads, CONFIGS])
        return config

    def regions_of(self, value: str | None) -> tuple[str, list[str]]:
        """The editor's value without the masks that lie elsewhere, and a line for each of these. Raises BadInput."""
        regions, lines = [], []
        for i, region in enumerate(region_editor.regions_of(value), 1):
            there = os.path.isfile(region.mask) and self.folders.hold(region.mask, [self.uploads, CONFIGS])
            if region.mask and not there:
                lines.append(
                    f"region {i}: its mask {Path(region.mask).name!r} is in none of the page's folders; give it anew"
                )
                region = dataclasses.replace(region, mask="")
            regions.append(region)
        return region_editor.value_of(regions) if lines else value or "[]", lines

    def draw(self, config: GenerateConfig, name: str = "drawing") -> Drawing:
        """Have the worker draw it; its pictures come into the album."""
        return self.worker.submit(Drawing(config=config, name=name, taken=self.take))

    def take(self, picture: Picture) -> None:
        """A picture is done: into the album with it, and its speed is noted unless a model was loaded for it."""
        from sd_hyena.generate.forecast import forecast

        self.album.add(picture)
        config = picture.config
        loaded = tuple(getattr(config, name) for name in ("model", "vae", "hyena", "lora", "controlnet", *SPEED))
        if loaded == self._loaded:
            with suppress(Exception):  # of a hint nothing depends on
                rate = forecast(config).operations / max(picture.seconds, 1e-3)
                self._write(self.state / RATES, self._stored(RATES) | {_key(config): rate})
        self._loaded = loaded

    def rate(self, config: GenerateConfig) -> float | None:
        """Operations a second of the last picture that was drawn with this model on this device, in this session or an
        earlier one; None if there was none."""
        rate = self._stored(RATES).get(_key(config))
        return rate if isinstance(rate, float) and rate > 0 else None

    def _painted(self, data: str) -> str:
        """A painted mask as a file."""
        from PIL import Image

        match = PAINTED.fullmatch(data)
        if not match or len(data) > self.config.max_upload << 20:
            raise BadInput("mask is no picture that was painted here; paint it again")
        raw = base64.b64decode(match[1])
        try:
            with Image.open(io.BytesIO(raw)) as image:
                painted = image.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 127))
        except (OSError, ValueError) as error:
            raise BadInput(f"mask cannot be read ({error}); paint it again") from None
        path = self.uploads / f"mask-{hashlib.sha256(raw).hexdigest()[:16]}.png"
        painted.save(path)
        return str(path)

    def remember(self, options: Mapping[str, Any], regions: str | None) -> None:
        """Keep settings for the next time the page is opened."""
        kept = {name: value for name, value in options.items() if name not in OURS_ALONE}
        self._write(self.state / "last.yaml", kept | {"page_regions": regions or "[]"})

    def remember_tab(self, tab: str, values: Mapping[str, Any]) -> None:
        """Likewise those of another tab."""
        self._write(self.state / f"last-{tab}.yaml", values)

    def last_of(self, tab: str) -> dict[str, Any]:
        """The settings that a tab had last time."""
        return self._stored(f"last-{tab}.yaml")

    def last(self) -> tuple[dict[str, Any], str]:
        """The settings of last time, and the regions as their editor has them."""
        stored = self._stored("last.yaml")
        regions = stored.pop("page_regions", "[]")
        known = {f.name for f in dataclasses.fields(GenerateConfig)}
        return {name: value for name, value in stored.items() if name in known}, regions

    def tidy(self) -> None:
        """Delete what is old and what none of the settings and presets names."""
        with self._writing:
            tidy(self.state, [*self.state.glob("*.yaml"), *self.presets_folder.glob("*.yaml")])

    def _stored(self, name: str) -> dict[str, Any]:
        try:
            (stored,) = read_documents(str(self.state / name))
        except (BadInput, ValueError):
            return {}
        return stored

    def presets(self) -> dict[str, Path]:
        """By name: those that ship, and those that were saved here."""
        folders = (CONFIGS / "generate", self.presets_folder)
        return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}

    def preset(self, name: str | None) -> dict[str, Any]:
        """The options of a preset. Raises BadInput."""
        path = self.presets().get(name or "")
        if path is None:
            raise BadInput(f"preset={name!r} is none; there are {', '.join(self.presets())}")
        options, *more = read_documents(str(path))
        if more:
            raise BadInput(f"preset={name!r} is a file of several documents; a preset is one")
        from_dict(GenerateConfig, options)
        return options

    def save_preset(self, name: str | None, config: GenerateConfig) -> Path:
        """As a YAML file that generate.py --config reads too. Raises BadInput."""
        name = (name or "").strip()
        if not re.fullmatch(r"[\w][\w .-]{0,60}", name):
            raise BadInput(f"preset={name!r} must be a name of letters, digits, blanks, - and _")
        if (CONFIGS / "generate" / f"{name}.yaml").is_file():
            raise BadInput(f"preset={name!r} is one that ships; choose another name")
        defaults = to_dict(GenerateConfig())
        kept = {k: v for k, v in to_dict(config).items() if v != defaults[k] and k not in OURS_ALONE}
        self.presets_folder.mkdir(parents=True, exist_ok=True)
        path = self.presets_folder / f"{name}.yaml"
        self._write(path, kept)
        return path

    def close(self) -> None:
        """End what is drawn."""
        self.worker.close()

    def _write(self, path: Path, values: Mapping[str, Any]) -> None:
        with self._writing, replacing(path) as temporary:
            temporary.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), "utf-8")


def _key(config: GenerateConfig) -> str:
    return " ".join(f"{name}={getattr(config, name)}" for name in ("model", *SPEED))


def served(path: Path) -> str:
    """The address of a file that is served in place."""
    return "/gradio_api/file=" + os.path.abspath(path)
