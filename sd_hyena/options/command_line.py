"""How a config comes about: a frozen dataclass whose fields are options, from flags, YAML files and pictures.

Everything else comes from the fields too: the command line, `--help`, the metadata of what a run writes. Nothing heavy is
imported here, so bad input is answered before torch is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from sd_hyena.errors import BadInput
from sd_hyena.files import yaml_file
from sd_hyena.files.names import for_a_shell
from sd_hyena.options import drawn_again, from_image, given_path, help, infotext_hires, moved_files, named_files
from sd_hyena.options.canvas import canvas, scaled
from sd_hyena.options.found import Found
from sd_hyena.options.meant import unrecognized
from sd_hyena.options.prompt_lines import is_file_of_prompts, prompt_lines
from sd_hyena.options.rules import LARGEST_SCALE, between
from sd_hyena.options.shipped import shipped_file

Config = typing.TypeVar("Config")


def option(
    default: Any,
    help: str,
    *flags: str,
    free: bool = False,
    path: Callable[[str, str], object] | None = None,
    beside: str = "",
    needs: str = "",
    group: str = "",
    common: bool = False,
    shown: str | None = None,
) -> Any:
    """A config field; `flags` are further spellings beside `--its_name`. A resumed run may change a `free` one.

    needs: the option without which it has no effect, see effect.py.
    group: under which of the config's GROUPS it is shown; `common` ones are in `--help`, up to the first semicolon of
    their help, see help.py.

    shown: what help says in place of the default.

    `path(value, name)` raises BadInput for what names nothing that can be used; it is asked of the command line, once
    all files and flags have had their say, and not of an empty value. `beside` is the folder beside the model where bare
    names are looked up before.
    """
    metadata = {"help": help, "flags": flags, "free": free, "path": path, "beside": beside, "needs": needs}
    metadata |= {"group": group, "common": common, "shown": shown}
    return field(default=default, metadata=metadata)


def parse(
    config_class: type[Config], arguments: list[str] | None = None, given: dict[str, Any] | None = None
) -> Config:
    """Read the command line; flags win over the YAML file behind `--config` and the image behind `--from`, and these
    over `given`. Only what is left then has to hold together, and to name files that are there.

    Raises BadInput, also for a file of several prompts, which `parse_all` reads.
    """
    configs = parse_all(config_class, arguments, given)
    if len(configs) > 1:
        raise BadInput("prompt: a file of several prompts is more than one drawing; give one of them")
    return configs[0]


def parse_all(
    config_class: type[Config], arguments: list[str] | None = None, given: dict[str, Any] | None = None
) -> list[Config]:
    """The same, of `-p @FILE` one config for each line. Raises BadInput."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    typed = _Typed.read(config_class, arguments, given or {})
    if not is_file_of_prompts(typed.chosen.get("prompt")):
        return [typed.config()]
    known: dict[tuple[str, ...], _Typed] = {}
    configs = []
    for line in prompt_lines(typed.chosen["prompt"]):
        try:
            if line.flags not in known:
                each = {"num_images": 1} | (given or {})
                known[line.flags] = _Typed.read(config_class, [*arguments, *line.flags], each)
            typed = known[line.flags]
            configs.append(typed.config({"prompt": line.prompt}, say=not configs))
        except BadInput as error:
            raise BadInput(f"{line.where}: {error}") from None
    return configs


@dataclass(frozen=True)
class _Typed:
    """What a command line says, before it has to hold together.

    `stored` comes from files, pictures and defaults, `chosen` is that with the flags on top, `untouched` that without.
    `former` are options of the last release. `lent` are the words of the picture to start from, where nothing else says
    what to draw.
    """

    config_class: type
    stored: dict[str, Any]
    chosen: dict[str, Any]
    untouched: dict[str, Any]
    former: dict[str, Any]
    pictures: tuple[Found, ...]
    lent: Found | None = None

    @classmethod
    def read(cls, config_class: type, typed: list[str], given: dict[str, Any], lent: Found | None = None) -> _Typed:
        """Raises BadInput."""
        arguments = [_spelled(argument) for argument in typed]
        if asked := help.asked_for(arguments):
            print(help.text(config_class, asked == help.ALL), end="")
            raise SystemExit(0)
        stored: dict[str, Any] = given | (lent.options if lent else {})
        for value in _taken(arguments, "--config", keep=False):
            stored |= _read_yaml(value)
        pictures = _pictures(arguments) if any(f.name == "from_image" for f in dataclasses.fields(config_class)) else []
        starting = _taken(arguments, "--init_image", keep=True) or stored.get("init_image")
        for found in pictures:
            stored |= found.options | (found.beside if starting else {})
        _check_types(config_class, stored)
        former = _former(config_class)
        parser = build_parser(config_class)
        parser.set_defaults({name: value for name, value in stored.items() if name not in former})
        if pictures:
            parser.set_defaults({"height": 0})  # until a flag says more
        try:
            values = parser.parse_args(arguments)
        except Exception as error:  # jsonargparse's ArgumentError, TypeError and YAML errors are all the user's to mend
            raise BadInput(_mended(yaml_file.first_line(error), typed, config_class)) from None
        chosen = {f.name: values[f.name] for f in dataclasses.fields(config_class)}
        if chosen.get("init_image") and chosen["prompt"] is None:
            return cls.read(config_class, typed, given, drawn_again.own_words(chosen["init_image"]))
        untouched = {f.name: stored.get(f.name, f.default) for f in dataclasses.fields(config_class)}
        if pictures:
            chosen |= _size_like(stored, chosen)
        flags = {name: values[name] for name in former if name in values}
        old = {
            name: stored[name] for name, new in former.items() if name in stored and values[new] == stored.get(new, "")
        }
        return cls(config_class, stored, chosen, untouched, old | flags, tuple(pictures), lent)

    def config(self, more: dict[str, Any] | None = None, say: bool = True) -> Any:
        """All of it, `more` on top; what of pictures is not followed is said. Raises BadInput."""
        chosen, found = self.chosen | (more or {}), [*self.pictures, *filter(None, [self.lent])]
        for one in found:
            chosen |= moved_files.of_own_picture(one, chosen, self.untouched)
            chosen |= named_files.of_picture(one, chosen, self.untouched)
        for one in self.pictures:
            chosen |= infotext_hires.upscaler_beside(one, chosen, self.untouched)
        config = from_dict(self.config_class, chosen | self.former)
        if self.former:
            config.note_former(tuple(self.former))
        config = with_paths(config)
        for one in found if say else ():
            if line := one.told(chosen, self.untouched, lent=one is self.lent):
                print(line)
        return config


def _pictures(arguments: list[str]) -> list[Found]:
    """What the pictures behind --from say."""
    return [from_image.read(path) for flag in ("--from_image", "--from") for path in _taken(arguments, flag, keep=True)]


def _size_like(stored: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """Width and height in the shape of a picture behind --from, unless a flag gives both. Raises BadInput."""
    if not (width := stored.get("width")):
        return {}
    size = width, stored.get("height") or width
    if scale := chosen["scale"]:
        if chosen["width"] != width or chosen["height"]:
            raise BadInput(f"scale={scale:g} and --width or --height contradict each other; leave one away")
        between(SimpleNamespace(scale=scale), 0, LARGEST_SCALE, "scale")
        return dict(zip(("width", "height"), scaled(size, scale), strict=True)) | {"scale": 0.0}
    if chosen["height"] or not chosen["width"]:
        return {}
    return {"height": size[1] if chosen["width"] == width else canvas(chosen["width"], 0, size, size)[1]}


def with_paths(config: Config) -> Config:
    """The config with the paths of what it names: beside its model, or among the files that ship; once all of it was looked
    at, without torch; and with the numbers that it leaves to its model. Raises BadInput."""
    if hasattr(config, "lora"):
        config = dataclasses.replace(config, **named_files.resolved(vars(config)))
    paths = {}
    for f in dataclasses.fields(config):
        value, look, kind = getattr(config, f.name), f.metadata["path"], f.metadata["beside"]
        if value and kind:
            value = paths[f.name] = given_path.located(value, f.name, _model(config), kind)
        if value and look:
            value = paths[f.name] = shipped_file(value)
            look(value, f.name)
    config = dataclasses.replace(config, **paths)
    return config.filled() if hasattr(config, "filled") else config


def _model(config: Any) -> str:
    """The value of the option that names the model."""
    return next(
        (getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata["path"] is given_path.model), ""
    )


def build_parser(config_class: type):
    """The command line of a config, generated from its fields; help.py says what there is."""
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, add_help=False)
    parser.add_argument("--config", action="config")
    types = _types_of(config_class)
    for f in dataclasses.fields(config_class):
        flags = [*(flag for flag in f.metadata["flags"] if not flag.startswith("--")), f"--{f.name}"]
        flags += [flag for flag in f.metadata["flags"] if flag.startswith("--")]
        if types[f.name] is bool:
            parser.add_argument(*flags, action=ActionYesNo, default=f.default)
        else:
            plain = str if types[f.name] == str | None else types[f.name]
            parser.add_argument(*flags, type=plain, default=f.default)
    for name in _former(config_class):
        kind = config_class.former_type(name)
        typed = {"action": ActionYesNo} if kind is bool else {"type": kind}
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, **typed)
    return parser


def _spelled(argument: str) -> str:
    """A flag with underscores, which dashes stand for; anything else as it is."""
    name, equals, value = argument.partition("=")
    return (
        name[:2] + name[2:].replace("-", "_") + equals + value if re.fullmatch(r"--[A-Za-z][\w+-]*", name) else argument
    )


def _mended(said: str, typed: list[str], config_class: type) -> str:
    """The parser's complaint in our words, with what was meant."""
    names = [f.name for f in dataclasses.fields(config_class)]
    if said.startswith("unrecognized arguments: "):
        strange = said.partition(": ")[2].split(" ")
        if flags := [argument for argument in typed if argument.startswith("-") and _spelled(argument) in strange]:
            return unrecognized([flag.partition("=")[0] for flag in flags], names)
        return f"unrecognized {' '.join(strange)}; an option has a name in front, and spaces need quotes; see --help"
    if wrong := re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', said):
        kind = _types_of(config_class).get(wrong[1]) or config_class.former_type(wrong[1])
        return _must_be(wrong[1], repr(wrong[2]), kind)
    return f"{said}; see --help"


def _must_be(name: str, value: str, kind: Any) -> str:
    """What an option takes, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if typing.get_origin(kind) is Literal:
        return f"{name}={value} must be one of {', '.join(typing.get_args(kind))}"
    return f"{name}={value} must be {' or '.join(words[part] for part in typing.get_args(kind) or (kind,) if part in words)}"


def _former(config_class: type) -> Mapping[str, str]:
    """Options of the last release, and the option that took their place: accepted, unless that is given as a flag."""
    return getattr(config_class, "FORMER", {})


def _taken(arguments: list[str], flag: str, keep: bool) -> list[str]:
    """The values of a flag (`--flag X` or `--flag=X`), taken out of the arguments unless `keep`."""
    values, i = [], 0
    while i < len(arguments):
        name, equals, value = arguments[i].partition("=")
        if name != flag:
            i += 1
            continue
        if not equals and i + 1 == len(arguments):
            raise BadInput(f"{flag} needs a file behind it")
        width = 1 if equals else 2
        values.append(value if equals else arguments[i + 1])
        if keep:
            i += width
        else:
            del arguments[i : i + width]
    return values


def from_dict(config_class: type[Config], values: dict[str, Any]) -> Config:
    """Build a config from names and values; strict on both. Raises BadInput."""
    types = _check_types(config_class, values)
    if any(name in values for name in _former(config_class)):
        values = config_class.translated(values)
    floats = {name for name, kind in types.items() if kind in (float, float | None)}
    return config_class(**{name: float(v) if name in floats and v is not None else v for name, v in values.items()})


def _check_types(config_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields' types, once each value is of its own. What values mean together is for the whole config to say."""
    types = _types_of(config_class)
    unknown = sorted(set(values) - set(types) - set(_former(config_class)))
    if unknown:
        raise BadInput(unrecognized(unknown, list(types)))
    for name, value in values.items():
        if name in types and not _is_of_type(value, types[name]):
            raise BadInput(_must_be(name, repr(value), types[name]))
    return types


@functools.cache
def _types_of(config_class: type) -> dict[str, Any]:
    """Of all fields; they stand in the source as text, which takes a third of a second to read."""
    hints = typing.get_type_hints(config_class)
    return {f.name: hints[f.name] for f in dataclasses.fields(config_class)}


def to_dict(config) -> dict[str, Any]:
    """The options as they would be given: what lies beside the model by its name, a height that is the width "as the
    width", but for a picture that is drawn again in its own shape."""
    values = dataclasses.asdict(config) | getattr(config, "in_full", dict)()
    for f in dataclasses.fields(config):
        if kind := f.metadata["beside"]:
            values[f.name] = given_path.named(values[f.name], _model(config), kind)
    square = values.get("height") == values["width"] and not values.get("init_image")
    return values | {"height": 0} if square else values


def _is_of_type(value: Any, expected: Any) -> bool:
    if typing.get_origin(expected) is Literal:
        return value in typing.get_args(expected)
    if typing.get_args(expected):
        return any(_is_of_type(value, part) for part in typing.get_args(expected))
    if expected in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if expected is float else expected)


def _read_yaml(path: str) -> dict[str, Any]:
    documents = yaml_file.read_documents(shipped_file(path))
    if len(documents) != 1:
        raise BadInput(
            f"config={path!r} is a recipe of {len(documents)} documents; run python -m sd_hyena.recipe {for_a_shell(path)}"
        )
    return documents[0]
