"""Students that need no training: a mixer without weights between the site's own projections."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from safari.head_groups import ProjectedStreams
from sd_hyena.options.landmarks import COUNT
from sd_hyena.sites import Site, find_sites, select
from sd_hyena.students.checkpoint import StudentFile
from sd_hyena.students.student import Projections, Size, StudentSpec, foldable, made, spec_for


class Untrained(nn.Module):
    """`to_out(mixer(to_q(x), to_k(x), to_v(x)))`: whatever the site's projections are, a LoRA's or a fine-tune's."""

    def __init__(self, spec: StudentSpec):
        super().__init__()
        self.spec, self.mixer = spec, made(spec)

    def forward(self, x: Tensor, projections: Projections, size: Size) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        sources = projections[:3]
        if all(foldable(source, x, x.dtype) for source in sources):
            weight = torch.stack([source.weight for source in sources])
            none = x.new_zeros(x.shape[-1])
            biases = [none if source.bias is None else source.bias for source in sources]
            has_any = any(source.bias is not None for source in sources)
            streams = ProjectedStreams(x, weight, torch.stack(biases) if has_any else None)
        else:
            streams = tuple(source(x) for source in sources)
        out, dropout = projections.to_out
        return dropout(out(self.mixer(streams, x, size)))


def untrained_spec(site: Site, landmarks: int) -> StudentSpec:
    """Of a site that is seen through so many landmarks of a head."""
    return spec_for(site, "clusters", {"landmarks": landmarks, "sample": max(2048, landmarks)}, (1, 1))


def untrained(unet: nn.Module, sites: str | Iterable[Site] = "level0", landmarks: int = COUNT) -> StudentFile:
    """Students of `unet` that see each picture through so many of its own clusters, at sites as `select` names them.

    Raises BadInput for sites that are not there.
    """
    chosen = select(find_sites(unet), sites) if isinstance(sites, str) else sites
    specs = [untrained_spec(site, landmarks) for site in chosen]
    return StudentFile({spec.site: Untrained(spec).eval() for spec in specs})
