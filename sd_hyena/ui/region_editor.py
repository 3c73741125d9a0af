"""The editor of regions as a component of the page, and its value as regions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from sd_hyena.errors import BadInput

HOST = "<div class='host'></div>"


def script(name: str) -> str:
    """A file that lies beside this one."""
    return (files("sd_hyena.ui") / name).read_text("utf-8")


def region_editor(**given: Any) -> gr.HTML:
    """Its value is a JSON list of bbox_controls; `width`, `height` and `src` are the canvas and what lies below it, `loras`
    the names that a region may ask for."""
    parts = dict(html_template=HOST, css_template=script("regions.css"), js_on_load=script("regions.js"))
    return gr.HTML(
        "[]", **parts, width=512, height=512, src="", loras="[]", label="regions", apply_default_css=False, **given
    )


def regions_of(value: str | None) -> tuple[Any, ...]:
    """What the editor holds. Raises BadInput."""
    if value in (None, "", "[]"):
        return ()
    from sd_hyena.large.regions import from_dict

    try:
        controls = json.loads(value or "[]")
    except ValueError:
        raise BadInput("regions: the editor's value is damaged; load the page again") from None
    return from_dict({"bbox_controls": controls}, "regions")


def value_of(regions: Sequence[Any]) -> str:
    """The editor's value for regions."""
    from sd_hyena.large.regions import to_dict

    return json.dumps(to_dict(regions)["bbox_controls"])


def written(value: str | None, folder: Path) -> str:
    """The regions as a file of `folder`, named by what it holds; empty if there are none. Raises BadInput."""
    regions = regions_of(value)
    if not regions:
        return ""
    from sd_hyena.large.regions import to_dict, write_regions

    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(json.dumps(to_dict(regions)).encode()).hexdigest()[:16]
    write_regions(path := folder / f"{name}.json", regions)
    return str(path)
