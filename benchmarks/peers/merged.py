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
        stays = (into != torch.arange(x.shape[1], device=x.device)).int().argsort(dim=1, stable=True)
        stays = stays[:, : x.shape[1] - self._merged(size)].contiguous()
        merged = []
        for t in streams:
            index = into[..., None].expand_as(t)
            averaged = torch.zeros_like(t).scatter_reduce(1, index, t, "mean", include_self=False)
            merged.append(averaged.gather(1, stays[..., None].expand(-1, -1, t.shape[-1])))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in merged)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        place = torch.searchsorted(stays, into)  # of each token's answer among those of the ones that stay
        return y.gather(1, place[..., None].expand(-1, -1, y.shape[-1]))

    def _merged(self, size: tuple[int, int]) -> int:
        """How many tokens are; the first of each square is not."""
        h, w = size
        return min(int(self.ratio * h * w), h * w - -(-h // 2) * -(-w // 2))

    def _into(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """For each token the one that it is merged into, often itself; (B, L)."""
        h, w = size
        is_first = [(y % 2, x_ % 2) == (0, 0) for y in range(h) for x_ in range(w)]
        first, others = (
            torch.tensor([i for i, yes in enumerate(is_first) if yes is wanted], dtype=torch.long, device=x.device)
            for wanted in (True, False)
        )
        into = torch.arange(h * w, device=x.device).expand(len(x), -1).clone()
        n = self._merged(size)
        if not n:
            return into
        unit = F.normalize(x.detach().float(), dim=-1)
        likeness, target = (unit[:, others] @ unit[:, first].mT).max(-1)
        merging = likeness.topk(n, dim=-1).indices
        return into.scatter(1, others[merging], first[target.gather(1, merging)])
