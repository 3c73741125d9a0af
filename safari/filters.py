"""Implicit filters: position -> sine MLP -> decay window (Poli et al. 2023, "Hyena Hierarchy", section 3.3).

Shapes: L tokens, C filter channels, P positions (L lags of a causal filter, 2L-1 of a bidirectional one).
Names, defaults and numbers of the causal form are those of HazyResearch/safari, so its state dicts load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _register(module: nn.Module, name: str, value: Tensor, lr: float) -> None:
    """A buffer at a rate of 0, else a parameter that notes it."""
    if lr == 0:
        module.register_buffer(name, value)
    else:
        module.register_parameter(name, nn.Parameter(value))
        getattr(module, name)._optim = {"lr": lr, "weight_decay": 0.0}


class PositionalFeatures(nn.Module):
    """`z = [t, Re e, Im e]` with `e = exp(-i f w)` at every lag; z is a parameter, the time t a buffer."""

    def __init__(self, emb_dim: int, seq_len: int, bidirectional: bool, lr: float):
        super().__init__()
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim={emb_dim} must be odd and at least 3 (time, cosines, sines)")
        self.seq_len, self.bidirectional = seq_len, bidirectional
        bands = (emb_dim - 1) // 2
        lag = torch.arange(-(seq_len - 1) if bidirectional else 0, seq_len)
        t = lag / max(seq_len - 1, 1) if bidirectional else torch.linspace(0, 1, seq_len)
        w = 2 * math.pi * lag / seq_len
        f = torch.linspace(1e-4, bands - 1, bands)
        angle = f * w[:, None]
        _register(self, "z", torch.cat([t[:, None], angle.cos(), -angle.sin()], dim=-1)[None], lr)
        self.register_buffer("t", t[None, :, None])

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        """The features (1, P, emb_dim) and times (1, P, 1) of the lags that `length` tokens can have."""
        start = self.seq_len - length if self.bidirectional else 0
        stop = self.seq_len + length - 1 if self.bidirectional else length
        return self.z[:, start:stop], self.t[:, start:stop]


class Sine(nn.Module):
    """`sin(freq x)` with a learned frequency per feature."""

    def __init__(self, dim: int, w: float):
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


class DecayWindow(nn.Module):
    """`h exp(-|t| |delta|) + shift h`: each channel forgets at its own, fixed rate."""

    def __init__(
        self,
        channels: int,
        fast_decay_pct: float,
        slow_decay_pct: float,
        target: float,
        modulate: bool,
        shift: float,
        lr: float,
    ):
        super().__init__()
        self.modulate, self.shift = modulate, shift
        slowest, fastest = math.log(target) / slow_decay_pct, math.log(target) / fast_decay_pct
        _register(self, "deltas", torch.linspace(slowest, fastest, channels)[None, None], lr)

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        return h * (torch.exp(-t.abs() * self.deltas.abs()) + self.shift) if self.modulate else h


class HyenaFilter(nn.Module):
    """The long filters of a Hyena operator as a function of position.

    `forward(L)` gives (P, C); `bias` (C,) weighs the skip connection beside the convolution. Options are those of
    safari: `normalized` divides by the L1 norm over channels what the window has left, `bias=False` drops the skip
    connection. `dropout` acts on the filter; safari takes it and does nothing with it. `lr`, `wd`, `lr_pos_emb` and
    `modulation_lr` are notes for an optimizer, left as safari leaves them in `_optim` of the parameters; what has a
    rate of 0 is a buffer.
    """

    def __init__(
        self,
        channels: int,
        seq_len: int,
        *,
        order: int = 64,
        bidirectional: bool = False,
        emb_dim: int = 3,
        w: float = 1.0,
        num_inner_mlps: int = 2,
        dropout: float = 0.0,
        modulate: bool = True,
        shift: float = 0.0,
        fast_decay_pct: float = 0.3,
        slow_decay_pct: float = 1.5,
        target: float = 1e-2,
        normalized: bool = False,
        bias: bool = True,
        lr: float = 1e-3,
        wd: float = 0.0,
        lr_pos_emb: float = 1e-5,
        modulation_lr: float = 0.0,
    ):
        super().__init__()
        self.normalized, self.use_bias = normalized, bias
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = PositionalFeatures(emb_dim, seq_len, bidirectional, lr_pos_emb)
        sine = Sine(order, w)  # one, shared by all layers
        hidden = [layer for _ in range(num_inner_mlps) for layer in (nn.Linear(order, order), sine)]
        last = nn.Linear(order, channels, bias=False)
        self.implicit_filter = nn.Sequential(nn.Linear(emb_dim, order), sine, *hidden, last)
        for parameter in self.implicit_filter.parameters():
            parameter._optim = {"weight_decay": wd, "lr": lr}
        decay = fast_decay_pct, slow_decay_pct, target, modulate, shift
        self.modulation = DecayWindow(channels, *decay, modulation_lr)
        self.dropout = nn.Dropout(dropout)

    def forward(self, length: int) -> Tensor:
        z, t = self.pos_emb(length)
        with torch.autocast(z.device.type, enabled=False):  # a sine of a sine of a sine: bfloat16 gives another filter
            h = self.modulation(t, self.implicit_filter(z))
            if self.normalized:
                h = h / h.norm(p=1, dim=-1, keepdim=True)
            return self.dropout(h[0])

    def skip(self) -> Tensor:
        """The weights (C,) of the skip connection."""
        return self.bias if self.use_bias else torch.zeros_like(self.bias)
