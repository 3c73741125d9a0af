"""Judges an image against its caption by its pixels alone. Written and frozen before the teacher was trained.

An image passes when its connected patches of colour are exactly the caption's objects, each of the right shape and
side, and everything else is the caption's background.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from scipy import ndimage

from .scenes import COLOURS, SHAPES, STRIPE, Caption, shape_mask

PALETTE = np.array([*COLOURS.values(), STRIPE], np.float32)
NAMES = [*COLOURS, "stripe"]
SMALLEST_OBJECT = 0.004  # of the image's area; smaller patches are edges and specks
SHAPE_AGREEMENT = 0.8  # intersection over union with the ideal shape in the same box
BACKGROUND_SHARE = 0.9  # of the pixels that belong to no object
MIRROR_AGREEMENT = 0.75


def faults(image: np.ndarray, caption: str | Caption) -> list[str]:
    """What is wrong with a uint8 (H, W, 3) image of `caption`; an empty list means it is right."""
    caption = Caption.parse(caption) if isinstance(caption, str) else caption
    labels = _nearest_colour(image)
    background = {caption.background, *(["stripe"] if caption.pattern else [])}
    found, covered = [], np.zeros(labels.shape, bool)
    for index, name in enumerate(NAMES):
        if name not in background:
            for shape, x, mask in _objects(labels == index):
                found.append((name, shape, x))
                covered |= mask
    return _object_faults(found, covered, caption) + _background_faults(labels, covered, caption)


def is_right(image: np.ndarray, caption: str | Caption) -> bool:
    """Whether the image shows its caption."""
    return not faults(image, caption)


def _nearest_colour(image: np.ndarray) -> np.ndarray:
    distance = np.linalg.norm(image[:, :, None].astype(np.float32) - PALETTE, axis=-1)
    return distance.argmin(-1)


def _objects(mask: np.ndarray):
    """Yield (shape or "?", centre x in -0.5 … 0.5 of the width, mask) of each patch that is large enough."""
    size = max(3, round(min(mask.shape) / 64))
    opened = ndimage.binary_opening(mask, np.ones((size, size)))
    components, _ = ndimage.label(opened)
    for number, box in enumerate(ndimage.find_objects(components), start=1):
        patch = components[box] == number
        if patch.sum() < SMALLEST_OBJECT * mask.size:
            continue
        h, w = patch.shape
        y, x = np.mgrid[:h, :w]
        x, y = (2 * x + 1) / w - 1, (2 * y + 1) / h - 1
        ideals = {shape: shape_mask(shape, x, y) for shape in SHAPES}
        overlap = {shape: (patch & ideal).sum() / (patch | ideal).sum() for shape, ideal in ideals.items()}
        best = max(overlap, key=overlap.get)
        good = overlap[best] >= SHAPE_AGREEMENT and 0.7 <= w / h <= 1.4
        yield best if good else "?", (box[1].start + box[1].stop) / 2 / mask.shape[1] - 0.5, components == number


def _object_faults(found, covered, caption: Caption) -> list[str]:
    copies = 2 if caption.mirrored else 1
    wanted = Counter()
    for group in caption.groups:
        wanted[group.colour, group.shape] += copies * group.count
    seen = Counter((colour, shape) for colour, shape, _ in found)
    if seen != wanted:
        return [f"objects {dict(seen)} instead of {dict(wanted)}"]
    problems = []
    if caption.relation in ("left of", "right of"):
        first, second = caption.groups
        if (first.colour, first.shape) != (second.colour, second.shape):
            xs = [[x for c, s, x in found if (c, s) == (g.colour, g.shape)] for g in caption.groups]
            left, right = xs if caption.relation == "left of" else xs[::-1]
            if not max(left) < min(right):
                problems.append(f"the {first} is not {caption.relation} the {second}")
    if caption.mirrored:
        flipped = covered[:, ::-1]
        agreement = (covered & flipped).sum() / (covered | flipped).sum()
        if agreement < MIRROR_AGREEMENT:
            problems.append(f"the halves agree only to {agreement:.2f}")
    return problems


def _background_faults(labels, covered, caption: Caption) -> list[str]:
    size = max(3, round(min(labels.shape) / 40))
    free = ~ndimage.binary_dilation(covered, np.ones((size, size)))
    if not free.any():
        return ["no background is visible"]
    plain, stripe = NAMES.index(caption.background), NAMES.index("stripe")
    share = (labels[free] == plain).mean()
    if not caption.pattern:
        return [] if share >= BACKGROUND_SHARE else [f"only {share:.2f} of the background is {caption.background}"]
    stripes = (labels[free] == stripe).mean()
    if share + stripes < BACKGROUND_SHARE or min(share, stripes) < 0.25:
        return [f"the background is {share:.2f} {caption.background} and {stripes:.2f} stripe"]
    axis = 1 if caption.pattern.startswith("horizontal") else 0
    of_line = np.where(free, labels == stripe, np.nan)
    with np.errstate(all="ignore"):
        line = np.nanmean(of_line, axis=axis, keepdims=True)
    straight = np.nanmean(np.where(free, (line > 0.5) == (labels == stripe), np.nan))
    return [] if straight >= BACKGROUND_SHARE else [f"the stripes are straight only to {straight:.2f}"]
