"""Captioned procedural scenes: what the shipped teacher was taught to draw.

A caption fixes the objects (count, colour, shape), how they lie to each other and the background; positions, sizes and
the phase of the stripes are free. Objects share colours across the picture, mirrored scenes repeat their left half, and
stripes continue behind objects, so a model of these scenes needs self-attention by place and by content.

Lengths are fractions of the image's short side, so one scene can be drawn at any size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
STRIPE = (128, 128, 128)  # what a striped background alternates with; no object has this colour
SHAPES = ("circle", "square", "triangle")
PATTERNS = ("", "horizontal stripes", "vertical stripes")
RELATIONS = ("left of", "right of", "and")
NUMBERS = {"a": 1, "two": 2, "three": 3}
WORD_OF = {count: word for word, count in NUMBERS.items()}
WORDS = tuple(
    sorted(
        {*COLOURS, *SHAPES, *(s + "s" for s in SHAPES), *NUMBERS}
        | {"left", "right", "of", "and", "mirrored", "on", "horizontal", "vertical", "stripes"}
    )
)


@dataclass(frozen=True)
class Group:
    """`count` equal objects of one colour and shape."""

    count: int
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{WORD_OF[self.count]} {self.colour} {self.shape}{'s' if self.count > 1 else ''}"


@dataclass(frozen=True)
class Caption:
    """What a scene shows; `str` gives its sentence and `Caption.parse` reads it back."""

    groups: tuple[Group, ...]
    relation: str  # how the first group lies to the second: one of RELATIONS, or "" for one group
    mirrored: bool
    background: str
    pattern: str

    def __str__(self) -> str:
        objects = f" {self.relation} ".join(map(str, self.groups))
        mirrored = " mirrored" if self.mirrored else ""
        pattern = f" {self.pattern}" if self.pattern else ""
        return f"{objects}{mirrored} on {self.background}{pattern}"

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Read a sentence of this grammar. Raises ValueError on any other."""
        group = rf"({'|'.join(NUMBERS)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?"
        sentence = (
            rf"{group}(?: ({'|'.join(RELATIONS)}) {group})?( mirrored)? on ({'|'.join(COLOURS)})"
            rf"(?: ({'|'.join(filter(None, PATTERNS))}))?"
        )
        match = re.fullmatch(sentence, text.strip())
        if not match:
            raise ValueError(f"not a caption of these scenes: {text!r}")
        n1, c1, s1, relation, n2, c2, s2, mirrored, background, pattern = match.groups()
        groups = [Group(NUMBERS[n1], c1, s1)] + ([Group(NUMBERS[n2], c2, s2)] if n2 else [])
        return cls(tuple(groups), relation or "", bool(mirrored), background, pattern or "")


@dataclass(frozen=True)
class Item:
    """One drawn object: centre and half-size in fractions of the short side, measured from the image's centre."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """A caption with its free parameters chosen."""

    caption: Caption
    items: tuple[Item, ...]
    period: float  # of the stripes
    phase: float


def random_caption(rng: np.random.Generator) -> Caption:
    """Draw a caption: 40 % one object, 20 % a count, 25 % two groups side by side, 15 % mirrored."""
    background = str(rng.choice(list(COLOURS)))
    pattern = str(rng.choice(PATTERNS, p=[0.5, 0.25, 0.25]))

    def group(count: int) -> Group:
        return Group(count, str(rng.choice([c for c in COLOURS if c != background])), str(rng.choice(SHAPES)))

    kind = rng.choice(["single", "count", "beside", "mirrored"], p=[0.4, 0.2, 0.25, 0.15])
    if kind == "single":
        groups, relation = (group(1),), ""
    elif kind == "count":
        groups, relation = (group(int(rng.integers(2, 4))),), ""
    elif kind == "beside":
        counts = [(1, 1), (1, 2), (2, 1), (2, 2)][rng.choice(4, p=[0.55, 0.2, 0.2, 0.05])]
        groups, relation = tuple(map(group, counts)), str(rng.choice(RELATIONS[:2]))
    else:
        both = rng.random() < 0.5
        groups, relation = (group(1), group(1)) if both else (group(1),), "and" if both else ""
    return Caption(groups, relation, kind == "mirrored", background, pattern)


def random_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Place the caption's objects without overlap."""
    while True:
        items = _place(caption, rng)
        if items is not None:
            period = rng.uniform(0.16, 0.3)
            return Scene(caption, items, period, rng.uniform(0, period))


def _place(caption: Caption, rng: np.random.Generator, gap: float = 0.03, border: float = 0.03):
    total = sum(group.count for group in caption.groups) * (2 if caption.mirrored else 1)
    low, high = {1: (0.15, 0.27), 2: (0.11, 0.17)}.get(total, (0.095, 0.125))
    items: list[Item] = []
    for position, group in enumerate(caption.groups):
        radius = rng.uniform(low, high)
        limit = 0.5 - border - radius
        left, right = -limit, limit
        if caption.mirrored:
            right = -radius - gap / 2
        elif caption.relation in ("left of", "right of"):
            on_the_left = (position == 0) == (caption.relation == "left of")
            left, right = (left, -radius - gap / 2) if on_the_left else (radius + gap / 2, right)
        for _ in range(group.count):
            for _attempt in range(30):
                x, y = rng.uniform(left, right), rng.uniform(-limit, limit)
                if all(max(abs(x - o.x), abs(y - o.y)) > radius + o.radius + gap for o in items):
                    break
            else:
                return None
            items.append(Item(group.colour, group.shape, x, y, radius))
    if caption.mirrored:
        items += [Item(o.colour, o.shape, -o.x, o.y, o.radius) for o in items]
    return tuple(items)


def shape_mask(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Where the shape covers its box; x runs to the right and y down, both -1 … 1 over the box."""
    if shape == "circle":
        return x * x + y * y <= 1
    if shape == "square":
        return (abs(x) <= 1) & (abs(y) <= 1)
    return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)


def draw(
    scene: Scene, width: int = 256, height: int | None = None, supersample: int = 2, colours: dict = COLOURS
) -> np.ndarray:
    """Render to uint8 (height, width, 3), anti-aliased by `supersample`; `colours` are what the caption's words mean."""
    height = height or width
    w, h, short = width * supersample, height * supersample, min(width, height) * supersample
    y, x = np.mgrid[:h, :w].astype(np.float32)
    x, y = (x + 0.5 - w / 2) / short, (y + 0.5 - h / 2) / short
    image = np.empty((h, w, 3), np.uint8)
    image[:] = colours[scene.caption.background]
    if scene.caption.pattern:
        along = y if scene.caption.pattern.startswith("horizontal") else x
        image[((along + scene.phase) / scene.period) % 1 < 0.5] = STRIPE
    for item in scene.items:
        image[shape_mask(item.shape, (x - item.x) / item.radius, (y - item.y) / item.radius)] = colours[item.colour]
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX))


def numbered_scene(seed: int, index: int) -> Scene:
    """The index-th scene of an endless, reproducible stream."""
    rng = np.random.default_rng([seed, index])
    return random_scene(random_caption(rng), rng)
