"""Softmax attention inside windows of the grid: what attention is when it may look no further."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, size: tuple[int, int], window: int) -> Tensor:
    """Multi-head softmax attention within each `window` x `window` cells of the grid; (B, L, D), L = H W of any size.

    Windows at the right and bottom edge are cut where the image ends.
    """
    h, w = size
    window = min(window, max(h, w))
    down, right = -h % window, -w % window
    wh, ww = (h + down) // window, (w + right) // window

    def into_windows(t: Tensor) -> Tensor:
        t = F.pad(rearrange(t, "b (h w) d -> b h w d", h=h), (0, 0, 0, right, 0, down))
        return rearrange(t, "b (y p) (x q) (n e) -> (b y x) n (p q) e", p=window, q=window, n=heads)

    mask = None
    if down or right:
        inside = into_windows(torch.ones(1, h * w, heads, device=q.device)).bool()
        mask = inside[:, :1].mT.repeat(q.shape[0], 1, 1, 1)  # (b y x) 1 1 (p q): the keys that exist
    y = F.scaled_dot_product_attention(into_windows(q), into_windows(k), into_windows(v), attn_mask=mask)
    y = rearrange(y, "(b y x) n (p q) e -> b (y p) (x q) (n e)", y=wh, x=ww, p=window)
    return rearrange(y[:, :h, :w], "b h w d -> b (h w) d")


class WindowAttention(nn.Module):
    """The same as a mixer of the site's own queries, keys and values."""

    def __init__(self, d_model: int, heads: int, window: int = 8):
        super().__init__()
        if heads < 1 or d_model % heads or window < 1:
            raise ValueError(f"heads={heads} must divide d_model={d_model}, and window={window} be positive")
        self.heads, self.window = heads, window

    def forward(self, streams: tuple[Tensor, ...], x: Tensor, size: tuple[int, int]) -> Tensor:
        return window_attention(*streams, self.heads, size, self.window)
