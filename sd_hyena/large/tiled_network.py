"""A list of steps run over tiles, so that the result is that of the whole map.

The steps are cut before each norm whose statistics are not known yet. A segment is swept tile by tile from one stored
map into the next, with a halo of the few cells that its own steps see; meanwhile the statistics that the next norm needs
are gathered from what is written. Where all statistics are known beforehand, only an attention cuts.

B batch, C channels, (H, W) cells. Stored maps are (B, H, W, C), tiles (B, C, h, w).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise, product

import torch
from torch import Tensor, nn

from sd_hyena.large.progress import Progress, bar
from sd_hyena.large.steps import QUERIES, Add, Attend, Moments, Norm, Span, Step
from sd_hyena.large.tile_store import TileStore

Box = tuple[Span, Span]  # rows, columns
Size = tuple[int, int]


class NotFinite(FloatingPointError):
    """A norm's statistics are infinite or NaN, and so would be all that follows."""


def split(n: int, parts: int, index: int) -> Span:
    """Part `index` of n cells that are cut evenly into parts."""
    return index * n // parts, (index + 1) * n // parts


def crop(tile: Tensor, origin: Sequence[int], box: Box) -> Tensor:
    """The cells in a box, of a tile that starts at `origin`."""
    (top, bottom), (left, right) = box
    return tile[:, :, top - origin[0] : bottom - origin[0], left - origin[1] : right - origin[1]]


def window(cells: Tensor, box: Box, device: torch.device) -> Tensor:
    """The tile in a box of a map; beyond its border the map goes on at the other side."""
    size, ((top, bottom), (left, right)) = cells.shape[1:3], box
    if all(start >= 0 and stop <= n for (start, stop), n in zip(box, size, strict=True)):
        part = cells[:, top:bottom, left:right]
    else:
        rows, columns = (torch.arange(*span, device=cells.device) % n for span, n in zip(box, size, strict=True))
        part = cells[:, rows[:, None], columns]
    return part.to(device).movedim(-1, 1)


def cut(steps: Sequence[Step], known: Container[nn.GroupNorm]) -> list[list[Step]]:
    """Segments: each attention alone, and a new one before each norm whose statistics are not known."""
    segments: list[list[Step]] = []
    for step in steps:
        unknown = isinstance(step, Norm) and step.module not in known
        if not segments or unknown or isinstance(step, Attend) or isinstance(segments[-1][-1], Attend):
            segments.append([])
        segments[-1].append(step)
    return segments


@dataclass
class TiledNetwork:
    """Steps over tiles of a side of `tile` cells of the input; deeper maps have the same tiles at their own size.

    Maps wait in `store`; tiles are computed where the input lies. `circular`: every map is a torus.
    """

    steps: Sequence[Step]
    tile: int
    store: TileStore
    stats_dtype: torch.dtype = torch.float32
    circular: bool = False
    progress: Progress | None = None  # None shows a bar
    measured: dict[nn.GroupNorm, Moments] = field(default_factory=dict)  # in the last call

    def __call__(
        self, x: Tensor, known: Mapping[nn.GroupNorm, Moments] | None = None, own_statistics: bool = False
    ) -> Tensor:
        """(B, C, H, W) to what the steps make of it.

        Norms in `known` take their statistics from there, the others from the whole map; with `own_statistics` from
        each tile alone, and what the tiles had is merged into `measured`. Raises NotFinite where half precision
        overflows on the way.
        """
        self.measured, self.own_statistics, self.device = dict(known or {}), own_statistics, x.device
        axes = zip(*_sizes(self.steps, x.shape[2:]), strict=True)  # no tile may vanish at the coarsest level
        self.grid = tuple(max(min(-(-lengths[0] // self.tile), *lengths), 1) for lengths in axes)
        norms = {step.module for step in self.steps if isinstance(step, Norm)}
        segments = cut(self.steps, norms if own_statistics else self.measured)
        cells, kept = x.movedim(1, -1), None
        done, total = count(1), self._ticks(segments, x.shape[2:])
        with bar(total, "tile", self.progress) as tell:
            for segment, following in zip(segments, [*segments[1:], None], strict=True):
                if isinstance(segment[0], Norm) and segment[0].keeps:
                    kept = cells
                moments = self._moments_for(following)

                def written(tile: Tensor, moments=moments) -> None:
                    if moments is not None:
                        moments.add(tile)
                    self.store.settle()
                    tell(next(done), total)

                if isinstance(segment[0], Attend):
                    self._attend(segment[0], cells, written)
                else:
                    cells = self._sweep(segment, cells, kept, written, last=following is None)
                if any(isinstance(step, Add) for step in segment):
                    kept = None
                if moments is not None and x.dtype.itemsize < 4 and not moments.finite():
                    raise NotFinite(f"{x.dtype} overflows in this VAE")
        return cells.movedim(-1, 1)

    def _moments_for(self, segment: Sequence[Step] | None) -> Moments | None:
        """What has to be gathered for the norm that opens a segment."""
        norm = segment[0].module if segment and isinstance(segment[0], (Norm, Attend)) else None
        if norm is None or norm in self.measured or (self.own_statistics and isinstance(segment[0], Norm)):
            return None
        return self.measured.setdefault(norm, Moments(norm.num_groups, self.stats_dtype))

    def _ticks(self, segments: Sequence[Sequence[Step]], size: Size) -> int:
        ticks = 0
        for segment in segments:
            attend = isinstance(segment[0], Attend)
            ticks += -(-size[0] * size[1] // QUERIES) if attend else self.grid[0] * self.grid[1]
            size = _sizes(segment, size)[-1]
        return ticks

    def _attend(self, step: Attend, cells: Tensor, written: Callable[[Tensor], None]) -> None:
        for tile in step(cells.flatten(1, 2), self.measured[step.module], self.store, self.device):
            written(tile)

    def _sweep(
        self, segment: Sequence[Step], cells: Tensor, kept: Tensor | None, written: Callable, last: bool
    ) -> Tensor:
        sizes = _sizes(segment, tuple(cells.shape[1:3]))
        in_place = isinstance(segment[-1], Add) and not any(isinstance(s, Norm) and s.keeps for s in segment)
        out = None
        for index in product(*map(range, self.grid)):
            tile, box = self._tile(segment, sizes, cells, kept, index)
            if out is None:
                shape = (tile.shape[0], *sizes[-1], tile.shape[1])
                if last:
                    out = tile.new_empty(shape[0], shape[3], *shape[1:3]).movedim(1, -1)
                elif in_place and shape[3] <= kept.shape[3]:
                    out = kept[..., : shape[3]]  # an addition reads no cell but the one that it writes
                else:
                    out = self.store.empty(shape, tile.dtype)
            window(out, box, out.device).copy_(tile)
            written(tile)
        return out

    def _tile(
        self, segment: Sequence[Step], sizes: Sequence[Size], cells: Tensor, kept: Tensor | None, index: Size
    ) -> tuple[Tensor, Box]:
        """What a segment makes of one tile, and where that lies in the output."""
        boxes = [self._core(sizes[-1], index)]
        for step, size in zip(reversed(segment), reversed(sizes[:-1]), strict=True):
            boxes.insert(0, self._source(step, boxes[0], size))
        tile, own = window(cells, boxes[0], self.device), None
        for step, (before, box), size in zip(segment, pairwise(boxes), sizes[:-1], strict=True):
            origin = [start for start, _ in before]
            if isinstance(step, Norm):
                if step.keeps:
                    own = tile, origin
                moments = self.measured.get(step.module)
                if self.own_statistics:
                    moments = Moments(step.module.num_groups, self.stats_dtype)
                    moments.add(core := crop(tile, origin, self._core(size, index)))
                    self.measured.setdefault(step.module, Moments(moments.groups, moments.dtype)).add(core)
                tile = moments.normalize(tile, step.module)
            elif isinstance(step, Add):
                tile = step(tile, crop(*own, box) if own else window(kept, box, self.device))
            else:
                tile = crop(step.module(tile), [step.origin(start) for start in origin], box)
        return tile, boxes[-1]

    def _core(self, size: Size, index: Size) -> Box:
        return tuple(split(n, parts, i) for n, parts, i in zip(size, self.grid, index, strict=True))

    def _source(self, step: Step, box: Box, size: Size) -> Box:
        spans = [step.source(span) for span in box]
        return tuple(
            span if self.circular else (max(span[0], 0), min(span[1], n)) for span, n in zip(spans, size, strict=True)
        )


def _sizes(segment: Sequence[Step], size: Size) -> list[Size]:
    """Of the map before each step, and of the last one's output."""
    sizes = [tuple(size)]
    for step in segment:
        sizes.append(tuple(step.size(n) for n in sizes[-1]))
    return sizes
