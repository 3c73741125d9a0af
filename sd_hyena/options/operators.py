"""The operators that can stand in for an attention, each declared in one place: its name, class, streams, needs, options.

Nothing here imports torch: a class that ships is named by where it lies and imported when its first student is built, so
that `--help` and bad input are answered at once. An operator of your own is registered by its class:

    @register_operator("blur", "the mean of a square of values")
    class Blur(nn.Module):
        def __init__(self, d_model: int, *, side: int = 3): ...
        def forward(self, streams, x, size): ...

From then on `TrainConfig(operator="blur", operator_options="side=5")` trains it, and `load_students` reads its files.
"""

from __future__ import annotations

import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sd_hyena.errors import BadInput
from sd_hyena.options import key_values
from sd_hyena.options.key_values import Option, Value


@dataclass(frozen=True)
class Operator:
    """A token mixer, and what a student has to know to be built around it.

    Args:
        make: an `nn.Module` class, or "module:Class", which is imported when it is needed. `make(channels, **options)`
            gives a mixer; its `forward(streams, x, (H, W))` takes streams and tokens x of (B, L, D), L = H W, and returns
            (B, L, D). A file's header is tried without memory, so the constructor must not look into its tensors
        help: one line for `--help_all`
        options: by name, what it can be told
        streams: how many it takes: the site's query, keys and value, in this order, each with a trained change of its own.
            Given the options, if their number depends on them. 0: it is called as `forward(x)` and has projections of
            its own, the last of them `out_proj`
        heads: whether it needs the site's number of heads, which `make` takes as `heads`
        one_size: whether it serves only the (H, W) it was made for; `make` takes L behind the channels
        gates: whether all streams but the last are factors, which start near one
        ancestors: further options, those with flags of their own: --hyena_NAME
    """

    name: str
    make: str | Callable[..., Any]
    help: str
    options: Mapping[str, Option] = field(default_factory=dict)
    streams: int | Callable[[Mapping[str, Value]], int] = 3
    heads: bool = False
    one_size: bool = False
    gates: bool = False
    ancestors: tuple[str, ...] = ()

    def resolve(self) -> Callable[..., Any]:
        """Its class, imported."""
        return pkgutil.resolve_name(self.make) if isinstance(self.make, str) else self.make

    def count_streams(self, options: Mapping[str, Value]) -> int:
        return self.streams(options) if callable(self.streams) else self.streams

    def read(self, text: str) -> dict[str, Value]:
        """The options that `key=value,key=value` gives. Raises BadInput."""
        flagged = lambda name: f"{name} has a flag of its own, --hyena_{name}" if name in self.ancestors else ""
        return key_values.read(text, self.options, "operator_options", self.name, flagged)

    def check(self, options: Mapping[str, Any]) -> None:
        """What a file says of the options; others than these are for `make` to take or refuse. Raises BadInput."""
        for name, option in self.options.items():
            if name in options:
                option.check(name, options[name])

    def write(self, given: Mapping[str, Value], in_full: bool = False) -> str:
        """The text that `read` understands as these options, with every default if in full."""
        return key_values.write(given, self.options, in_full)

    def defaults(self) -> dict[str, Value]:
        return {name: option.default for name, option in self.options.items()}


def options_of(make: Callable[..., Any]) -> dict[str, Option]:
    """The options that a class takes: the parameters that have a default, of its own type or a `Literal` of texts.

    Raises TypeError for one of another type.
    """
    found = {}
    constructor = make.__init__ if inspect.isclass(make) else make
    kinds = typing.get_type_hints(constructor)
    for name, parameter in inspect.signature(make).parameters.items():
        if parameter.default is not parameter.empty:
            choices = typing.get_args(kinds.get(name)) if typing.get_origin(kinds.get(name)) is Literal else ()
            if type(parameter.default) not in (bool, int, float, str):
                raise TypeError(f"the option {name}={parameter.default!r} must be a bool, int, float or str")
            found[name] = Option(parameter.default, choices=choices)
    return found


_SEQUENCE = {
    "options": {
        "emb_dim": Option(33, "positional features of the filter, odd; safari's default of 3 has one frequency", low=3),
        "w": Option(3.0, "initial frequency of the filter's sines; safari's default is 1"),
    },
    "one_size": True,
    "ancestors": ("order", "filter_order", "num_blocks", "num_heads", "short_filter_order"),
}
_LANDMARKS = Option(
    128,
    "of a head: what the picture is seen through (128 as in older files; -y landmarks has up to 256); auto: by what an "
    "error costs, at this number's price or that of auto:NUMBER",
    low=1,
    auto=True,
)


def _order_and_value(options: Mapping[str, Value]) -> int:
    return options.get("order", 2) + 1


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator(
            "hyena2d",
            "safari:Hyena2d",
            "mixes by place (gated convolutions) and by content (clusters); serves every size",
            {
                "local": Option(9, "side of the explicit filter, odd; 0 leaves it out", low=0),
                "long": Option(
                    "none",
                    "the filter over the plane: by FFT, as a sum of products, along rows plus columns; none leaves it out",
                    ("full", "separable", "axial_1d", "none"),
                ),
                "rank": Option(4, "products in a separable filter", low=1),
                "reach": Option(64, "the farthest offset of the filter, in cells", low=1),
                "groups": Option(0, "filters of the long branch; 0 means one for each channel", low=0),
                "filter_order": Option(32, "width of the filter's MLP", low=1),
                "content": Option(
                    "clusters",
                    "attention by way of clusters of the picture's tokens, of learned landmarks, or linear attention with "
                    "this feature map; none leaves it out",
                    ("clusters", "landmarks", "hedgehog", "elu", "none"),
                ),
                "landmarks": _LANDMARKS,
                "window": Option(0, "side of the windows of an additional softmax attention; 0 leaves it out", low=0),
                "gates": Option("diagonal", "a factor per channel, or a 1x1 convolution", ("diagonal", "dense")),
                "norm": Option(True, "normalise the gated product and the output"),
            },
            heads=True,
        ),
        Operator(
            "landmarks",
            "safari:LandmarkAttention",
            "attention by way of tokens that learned queries gather",
            {"landmarks": _LANDMARKS},
            heads=True,
        ),
        Operator(
            "clusters",
            "safari:ClusterAttention",
            "attention to oneself and to clusters of the picture's own keys; near to softmax without training",
            {
                "landmarks": Option(
                    256,
                    "clusters of a head; auto: by what an error costs, at this number's price or that of auto:NUMBER",
                    low=1,
                    auto=True,
                ),
                "sample": Option(2048, "tokens that are clustered, spread over the picture", low=1),
                "steps": Option(2, "assignments of tokens to clusters", low=1),
                "learned": Option(False, "with weights of its own, which start as what it is without"),
            },
            heads=True,
        ),
        Operator(
            "bidirectional",
            "safari:BidirectionalHyena",
            "one-dimensional, over the raster of one size",
            streams=_order_and_value,
            gates=True,
            **_SEQUENCE,
        ),
        Operator(
            "causal",
            "safari:CausalHyena",
            "the same, seeing only what comes before",
            streams=_order_and_value,
            gates=True,
            **_SEQUENCE,
        ),
        Operator(
            "safari",
            "safari:HyenaOperator",
            "causal as published, blind to the site's projections",
            streams=0,
            **_SEQUENCE,
        ),
        Operator(
            "linear",
            "safari:LinFusion",
            "a baseline: linear attention in LinFusion's form",
            {
                "feature_map": Option("elu", "elu + 1, or a learned one", ("hedgehog", "elu")),
                "width": Option(0, "hidden layer of the MLPs before it; 0 means as many as channels", low=0),
            },
            heads=True,
        ),
        Operator(
            "windows",
            "safari:WindowAttention",
            "a baseline: softmax attention in windows",
            {"window": Option(8, "side in cells", low=1)},
            heads=True,
        ),
        Operator(
            "pointwise",
            "safari:PointwiseMixer",
            "a baseline that mixes nothing: an MLP on each token",
            {"hidden": Option(0, "width of its hidden layer; 0 means four times the channels", low=0)},
        ),
    )
}
_SHIPPED = frozenset(OPERATORS)


def register_operator(name: str, help: str, **facts: Any) -> Callable[[type], type]:
    """Decorates a class, which is an operator called `name` from then on; its options are its parameters with a default.

    `facts` are those of `Operator`: streams, heads, one_size, gates. Raises ValueError for the name of one that ships; a
    name of your own may be given again, as a notebook's cell is run twice.
    """
    if name in _SHIPPED or not name.isidentifier():
        raise ValueError(f"an operator cannot be called {name!r}: it ships with the program, or is no name")

    def register(make: type) -> type:
        OPERATORS[name] = Operator(name, make, help, options_of(make), **facts)
        return make

    return register


def operator_named(name: str) -> Operator:
    """Raises BadInput."""
    if name not in OPERATORS:
        raise BadInput(f"operator={str(name)[:80]!r} is none of {', '.join(OPERATORS)}")
    return OPERATORS[name]


def listing() -> str:
    """All of them with their options, for `--help_all`."""
    lines = ["operators, and their options behind --operator_options key=value,...:"]
    for operator in OPERATORS.values():
        lines.append(f"  {operator.name:<15}{operator.help}")
        lines += key_values.listed(operator.options)
    return "\n".join(lines)
