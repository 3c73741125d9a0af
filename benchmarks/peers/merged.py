"""Attention among merged tokens: ToMe for Stable Diffusion (Bolya and Hoffman 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_hyena.options.operators import register_operator


@register_operator("tome", "ToMe's: attention among tokens of which the most alike are merged", heads=True)
class MergedAttention(nn.Module):
    """Of each square of 2 x 2 cells the first token stays; of all others the share `ratio` of all tokens that is most like
    one that stays is averaged into it, before attention, and gets its answer afterwards.

    Tokens are compared by their cosine. Averaging tokens and then projecting them is averaging queries, keys and values.
    ToMe draws the token that stays at random; here it is the first, so that a picture repeats.
    """

    def __init__(self, d_model: int, heads: int, *, ratio: float = 0.5):
        super().__init__()
        if not 0 <= ratio <= 0.75:
            raise ValueError(f"ratio={ratio} must be from 0 to 0.75: one of four tokens stays")
        self.heads, self.ratio = heads, ratio

    def forward(self, streams: Sequence[Tensor], x: Tensor, size: tuple[int, int]) -> Tensor:
        into = self._into(x, size)
        merged = []
        for t in streams:
            index = into[..., None].expand_as(t)
            merged.append(torch.zeros_like(t).scatter_reduce(1, index, t, "mean", include_self=False))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in merged)
        stays = (into == torch.arange(x.shape[1], device=x.device))[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, stays).transpose(1, 2).flatten(2)
        return y.gather(1, into[..., None].expand_as(y))

    def _into(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """For each token the one that it is merged into, often itself; (B, L)."""
        h, w = size
        is_first = [(y % 2, x_ % 2) == (0, 0) for y in range(h) for x_ in range(w)]
        first, others = (
            torch.tensor([i for i, yes in enumerate(is_first) if yes is wanted], dtype=torch.long, device=x.device)
            for wanted in (True, False)
        )
        into = torch.arange(h * w, device=x.device).expand(len(x), -1).clone()
        n = min(int(self.ratio * h * w), len(others))
        if not n:
            return into
        unit = F.normalize(x.detach().float(), dim=-1)
        likeness, target = (unit[:, others] @ unit[:, first].mT).max(-1)
        merging = likeness.topk(n, dim=-1).indices
        return into.scatter(1, others[merging], first[target.gather(1, merging)])
