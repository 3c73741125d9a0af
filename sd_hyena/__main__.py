"""sd-hyena VERB, or python -m sd_hyena VERB: every command of the program by one name. VERB --help lists its options."""

from __future__ import annotations

import sys
from importlib import import_module

from sd_hyena import __version__

VERBS = {  # what is typed -> the module whose `command` answers it, and what that does
    "demo": ("sd_hyena.demo", "the main job, end to end, on the small model that ships"),
    "doctor": ("sd_hyena.doctor", "what this machine can do with a model"),
    "train": ("sd_hyena.distil.__main__", "distil self-attentions of a checkpoint into Hyena operators"),
    "recipe": ("sd_hyena.recipe", "stages of a distillation in turn"),
    "generate": ("sd_hyena.generate.__main__", "draw images with trained students swapped in"),
    "ui": ("sd_hyena.ui.__main__", "the same in a browser: draw, drag regions, compare, distil"),
    "upscale": ("sd_hyena.upscale", "enlarge pictures by an upscaler model"),
    "evaluate": ("sd_hyena.evaluate.__main__", "measure students against their teacher"),
    "describe": ("sd_hyena.students.checkpoint", "say what a file of students is"),
    "card": ("sd_hyena.evaluate.card", "write the model card of students, and upload both if asked"),
}


def main(arguments: list[str] | None = None) -> int:
    """Hand the rest of the command line to its verb; the exit code (options/command.py)."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help"):
        print(__doc__, *(f"  {name:<10} {what}" for name, (_, what) in VERBS.items()), sep="\n")
        return 0
    if verb == "--version":
        print(__version__)
        return 0
    if verb not in VERBS:
        print(f"error: {verb!r} is no command of sd-hyena; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return import_module(VERBS[verb][0]).command(rest)


if __name__ == "__main__":
    sys.exit(main())
