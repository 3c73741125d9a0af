"""What each way to grow can be told with `--grow_options`, by the names of its context manager.

A default of 0 or -1 goes by the picture's size or steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from sd_hyena.options import key_values
from sd_hyena.options.growing import AUTO
from sd_hyena.options.key_values import Option, Value

FLAG = "grow_options"
OPTIONS: dict[str, Mapping[str, Option]] = {
    "redraw": {},
    "diffusehigh": {
        "steps": Option(0, "the first of a stage's, which are held; 0: a third of them", low=0),
        "levels": Option(1, "of the wavelet transform", low=1),
        "moments": Option(4, "of Daubechies' wavelet, 4 is db4", low=1),
        "alpha": Option(1.0, "how much the picture is sharpened before", low=0),
    },
    "demofusion": {
        "dilation": Option(0, "cells from one of a sample to its next; 0: by the size", low=0),
        "c1": Option(3.0, "how soon the skip residual ends, larger is sooner"),
        "c2": Option(1.0, "likewise the dilated samples"),
        "c3": Option(1.0, "likewise their blur"),
        "sigma": Option(1.0, "of the blur at first, in cells"),
    },
    "deep_shrink": {
        "block": Option(3, "the input block behind which maps are made smaller", low=1),
        "factor": Option(2.0, "at least, of both sides; more where the canvas is larger", low=1),
        "start": Option(0.0, "the part of the noise schedule, 0 to 1, in which it begins", low=0),
        "end": Option(0.35, "and before which it ends", low=0),
        "after_skip": Option(True, "whether the map that is joined on the way up keeps its size"),
        "mode": Option("bicubic", "how maps are made smaller", ("bicubic", "bilinear", "nearest-exact", "area")),
    },
    "hidiffusion": {
        "t1": Option(-1.0, "of the noise schedule, where the first change ends; -1: by the size"),
        "t2": Option(-1.0, "likewise the second, which is not after the first"),
        "aggressive": Option(-1.0, "of SDXL: before which the second stands alone; -1: as published"),
    },
}


def read(method: str, text: str) -> dict[str, Value]:
    """What a text says to a method; auto has those of the method that it takes. Raises BadInput."""
    method = AUTO if method == "auto" else method
    return key_values.read(text, OPTIONS[method], FLAG, f"grow={method}")


def written(method: str, text: str) -> str:
    """The shortest text that says the same. Raises BadInput."""
    return key_values.write(read(method, text), OPTIONS[AUTO if method == "auto" else method])


def listing() -> str:
    """All of them, for `--help_all`."""
    lines = [f"ways to grow, and their options behind --{FLAG} key=value,...:"]
    for method, options in OPTIONS.items():
        if options:
            lines += [f"  {method}", *key_values.listed(options)]
    return "\n".join(lines)
