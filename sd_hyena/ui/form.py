"""A form made from a config's fields: a component for each option, and the way from their values to a config and back."""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from sd_hyena.errors import BadInput
from sd_hyena.options import given_path
from sd_hyena.options.help import grouped
from sd_hyena.options.own_defaults import own_defaults
from sd_hyena.ui.folders import SEPARATORS, SHIPPED, Folders, kind_of

LINES = {"prompt": 3, "negative_prompt": 2}
REST = "more options"
PICTURES = ("init_image", "mask", "control_image")  # of the options that are uploads
SEVERAL = given_path.pictures  # looks at the value of an option that takes several of them
HERE = {  # what differs on the page from what the help of an option says
    "prompt": "here one prompt, @FILE is generate.py's",
    "hyena": "here those that are chosen are used together; Compare draws alternatives",
    "lora": "a weight stands behind the name: type gold.safetensors:0.5 and press Enter",
}


class Form:
    """The components of a config's options by name. Build them inside gr.Blocks, where they are to stand."""

    def __init__(self, config_class: type, folders: Folders, prefix: str, left_out: Iterable[str] = ()):
        self.config_class, self.folders, self.prefix = config_class, folders, prefix
        self.types = typing.get_type_hints(config_class)
        self.fields = {f.name: f for f in dataclasses.fields(config_class) if f.name not in set(left_out)}
        self.fields = {name: f for name, f in self.fields.items() if kind_of(f) != "place"}
        self.components: dict[str, gr.components.Component] = {}

    def add(self, *names: str, **given: Any) -> list[gr.components.Component]:
        """Components for those of the options that there are and that have none yet."""
        made = []
        for name in names:
            if name in self.fields and name not in self.components:
                self.components[name] = self._component(self.fields[name], given)
                made.append(self.components[name])
        return made

    def add_groups(self, left_out: Iterable[str] = ()) -> None:
        """All that have no component yet, folded away by groups."""
        left_out = {*left_out, *self.components}
        for group, fields in grouped(self.config_class).items():
            names = [f.name for f in fields if f.name in self.fields and f.name not in left_out]
            if names:
                with gr.Accordion(group or REST, open=False):
                    self.add_in_pairs(*names)

    def add_in_pairs(self, *names: str) -> None:
        """Two beside each other, below each other on a narrow screen."""
        names = [name for name in names if name in self.fields and name not in self.components]
        for i in range(0, len(names), 2):
            with gr.Row():
                self.add(*names[i : i + 2], min_width=240)

    def needing(self, *names: str) -> list[str]:
        """These, and the options that have no effect without one of them."""
        found = [name for name in names if name in self.fields]
        for name, field in self.fields.items():
            if field.metadata["needs"].partition(":")[0] in found and name not in found:
                found.append(name)
        return found

    def values(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """Options from the components' values. Raises BadInput."""
        return {name: self.value(name, given) for name in self.components}

    def legible(self, given: Mapping[Any, Any]) -> dict[str, Any]:
        """Those of them that can be read, whatever is wrong with the others, and with all together."""
        found = {}
        for name in self.components:
            with suppress(BadInput, KeyError):
                found[name] = self.value(name, given)
        return found

    def value(self, name: str, given: Mapping[Any, Any]) -> Any:
        """One of them."""
        return self._value(name, given[self.components[name]])

    def _value(self, name: str, value: Any) -> Any:
        field, kind = self.fields[name], kind_of(self.fields[name])
        expected = self.types[name]
        if kind == "upload":
            return ",".join(path for path, _ in value) if isinstance(value, list) else value or ""
        if kind:
            return self.folders.value(name, kind, value)
        if _is_left_open(field) and isinstance(value, str | None):
            if not (value or "").strip():
                return field.default
            try:
                value = float(value)
            except ValueError:
                raise BadInput(f"{name}={value!r} must be a number, or empty") from None
        if value is None or (value == "" and type(None) in typing.get_args(expected)):
            if field.default is None or isinstance(field.default, str):
                return field.default
            raise BadInput(f"{name} is empty; give a number, e.g. {field.default}")
        kinds = typing.get_args(expected) or (expected,)
        if int in kinds and isinstance(value, float) and float not in kinds:
            if not value.is_integer():
                raise BadInput(f"{name}={value:g} must be a whole number")
            return int(value)
        if float in kinds and str in kinds and isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
        return value

    def defaults(self) -> dict[str, Any]:
        """The options of a form that nobody has touched."""
        return {name: self.fields[name].default for name in self.components}

    def uploads(self) -> list[str]:
        """The options that are uploads."""
        return [name for name in self.components if kind_of(self.fields[name]) == "upload"]

    def shown(self, options: Mapping[str, Any], uploads: Path | None = None) -> tuple[dict[Any, Any], list[str]]:
        """Updates, by component, that show these options, and a line for each that cannot be shown: a file in none of
        the page's folders, an upload that is not, or no longer, in the folder of `uploads`."""
        updates, lost = {}, []
        for name, value in options.items():
            if name not in self.components:
                continue
            field, kind = self.fields[name], kind_of(self.fields[name])
            if kind == "upload":
                files = given_path.several(value or "")
                there = [path for path in files if uploads and _lies_in(uploads, path)]
                lost += [
                    f"{name} {Path(path).name!r} is no upload of this page; give it anew"
                    for path in files
                    if path not in there
                ]
                several = field.metadata["path"] is SEVERAL
                update = gr.update(value=there if several else there[0] if there else None)
            elif kind:
                names, unknown = self.folders.names(kind, value or "")
                lost += [f"{name} {one!r} is in none of the page's folders" for one in unknown]
                if kind == "students" and len(given_path.alternatives(value or "")) > 1:
                    lost.append(f"{name}: the page draws one alternative at a time, so the first of {value!r}")
                single = names[0] if names else SHIPPED if kind == "models" else None
                update = gr.update(value=names if kind in SEPARATORS else single, choices=self.folders.choices(kind))
            else:
                update = gr.update(value=_shown(value, field, self.types[name]))
            updates[self.components[name]] = update
        return updates, lost

    def own(self, model: str) -> dict[Any, Any]:
        """Updates that show, in the fields that are left open, what the model itself is best drawn with."""
        try:
            own = vars(own_defaults(model))
        except BadInput:
            return {}
        return {
            component: gr.update(placeholder=f"the model's: {own[name]:g}")
            for component, name in self.left_open().items()
            if own.get(name)
        }

    def left_open(self) -> dict[Any, str]:
        """The components of numbers that the model, or a picture, decides if they are empty; the options' names."""
        return {made: name for name, made in self.components.items() if _is_left_open(self.fields[name])}

    def with_choices(self) -> dict[Any, Any]:
        """Updates with the files that are there now."""
        kinds = {name: kind_of(self.fields[name]) for name in self.components}
        return {
            self.components[name]: gr.update(choices=self.folders.choices(kind))
            for name, kind in kinds.items()
            if kind not in ("", "upload")
        }

    def faulty(self, message: str) -> str:
        """The option that a fault is of, empty if none is named."""
        names = self.fields.keys()
        first = re.match(r"(\w+)", message)
        if first and first[1] in names:
            return first[1]
        return next((word for word in re.findall(r"\w+", message) if word in names and "_" in word), "")

    def element(self, name: str) -> str:
        """The id of its component in the page."""
        return f"{self.prefix}-{name}"

    def _component(self, field: dataclasses.Field, given: dict[str, Any]) -> gr.components.Component:
        name, expected, kind = field.name, self.types[field.name], kind_of(field)
        info = "; ".join(filter(None, (field.metadata["help"], HERE.get(name))))
        told = dict(label=name.replace("_", " "), info=info, elem_id=self.element(name)) | given
        if kind == "upload":
            with gr.Column(min_width=told.get("min_width", 240)):
                return self._upload(field, told)
        if kind:
            several = kind in SEPARATORS
            value = [] if several else SHIPPED if kind == "models" else None
            told |= dict(choices=self.folders.choices(kind), allow_custom_value=True, multiselect=several)
            return gr.Dropdown(value=value, **told)
        if expected is bool:
            return gr.Checkbox(value=field.default, **told)
        if typing.get_origin(expected) is Literal:
            return gr.Dropdown(choices=list(typing.get_args(expected)), value=field.default, **told)
        kinds = typing.get_args(expected) or (expected,)
        if str in kinds:
            lines = LINES.get(name, 1)
            given = dict(placeholder="as the model's first example") if field.default is None else {}
            return gr.Textbox(
                value=_shown(field.default, field, expected), lines=lines, max_lines=3 * lines, **given, **told
            )
        if _is_left_open(field):
            # a text, for gradio's number shows and sends 0 where it is given none
            return gr.Textbox("", placeholder=field.metadata["shown"] or "open", lines=1, max_lines=1, **told)
        return gr.Number(value=field.default, precision=None if float in kinds else 0, **told)

    def _upload(self, field: dataclasses.Field, told: dict[str, Any]) -> gr.components.Component:
        """With its help below it, for gradio's own has no place for it."""
        info = told.pop("info")
        if field.name not in PICTURES:
            made = gr.File(type="filepath", file_types=[".txt"], height=90, **told)
        elif field.metadata["path"] is SEVERAL:
            given = dict(columns=3, height=240, object_fit="contain", interactive=True)
            made = gr.Gallery(type="filepath", sources=["upload", "clipboard"], **given, **told)
        else:
            made = gr.Image(type="filepath", sources=["upload", "clipboard"], height=240, **told)
        gr.HTML(escape(info), elem_classes="quiet", elem_id=f"{self.element(field.name)}-help", label=told["label"])
        return made


def _is_left_open(field: dataclasses.Field) -> bool:
    """Whether a number's default stands for one that the model, or a picture, decides."""
    return field.metadata.get("shown") is not None and not field.default and not isinstance(field.default, str)


def _shown(value: Any, field: dataclasses.Field, expected: Any) -> Any:
    """A value as its component has it: a number in a field for text as such, and nothing where it is left open."""
    left_open = _is_left_open(field)
    if not (left_open or str in (typing.get_args(expected) or (expected,))):
        return value
    if value is None or (left_open and value == field.default):
        return ""
    return value if isinstance(value, str) else f"{value:.12g}"


def _lies_in(folder: Path, path: str) -> bool:
    return os.path.isfile(path) and Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
