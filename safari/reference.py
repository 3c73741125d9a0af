"""The definitions, in O(L^2) and plain loops. Imported by tests only."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def long_conv(u: Tensor, h: Tensor, first_lag: int = 0) -> Tensor:
    """`y[t] = sum_j h[j] u[t - first_lag - j]`, with u zero outside 0 ... L-1."""
    length, taps = u.shape[-1], h.shape[-1]
    y = []
    for t in range(length):
        terms = [h[..., j] * u[..., t - first_lag - j] for j in range(taps) if 0 <= t - first_lag - j < length]
        y.append(sum(terms, torch.zeros_like(u[..., 0] * h[..., 0])))
    return torch.stack(y, dim=-1)


def causal_filter(state: dict[str, Tensor], length: int) -> Tensor:
    """safari's implicit filter from the weights alone, its positions computed anew; (length, C).

    l_max is the number of stored positions.
    """
    first = state["filter_fn.implicit_filter.0.weight"]
    l_max, bands = state["filter_fn.pos_emb.z"].shape[1], (first.shape[1] - 1) // 2
    rows = []
    for p in range(length):
        t = p / (l_max - 1) if l_max > 1 else 0.0
        angle = 2 * math.pi * p / l_max
        f = [1e-4 + (bands - 1 - 1e-4) * k / (bands - 1) if bands > 1 else 1e-4 for k in range(bands)]
        z = [t, *(math.cos(k * angle) for k in f), *(-math.sin(k * angle) for k in f)]
        x = torch.tensor(z, dtype=first.dtype)
        layer = 0
        while f"filter_fn.implicit_filter.{layer}.bias" in state:
            weight, bias = (state[f"filter_fn.implicit_filter.{layer}.{part}"] for part in ("weight", "bias"))
            x = torch.sin(state["filter_fn.implicit_filter.1.freq"][0] * (weight @ x + bias))
            layer += 2
        h = state[f"filter_fn.implicit_filter.{layer}.weight"] @ x
        rows.append(h * torch.exp(-t * state["filter_fn.modulation.deltas"].flatten().abs()))
    return torch.stack(rows)


def hyena_operator(state: dict[str, Tensor], x: Tensor, order: int = 2) -> Tensor:
    """safari's causal operator with default options, from a state dict; x (B, L, D)."""
    d_model, length = x.shape[-1], x.shape[1]
    u = x @ state["in_proj.weight"].T + state["in_proj.bias"]
    taps = state["short_filter.weight"][:, 0]
    u = torch.nn.functional.pad(u, (0, 0, taps.shape[1] - 1, 0))
    u = sum(taps[:, k] * u[:, k : k + length] for k in range(taps.shape[1])) + state["short_filter.bias"]
    streams = [u[..., i * d_model : (i + 1) * d_model] for i in range(order + 1)]
    x0, gates, v = streams[0], streams[1:order], streams[order]
    h, bias = causal_filter(state, length), state["filter_fn.bias"]
    for o, gate in enumerate(reversed(gates)):
        channels = torch.arange(d_model) * (order - 1) + o  # laid out (v o), v outer
        v = gate * v
        mixed = long_conv(v.transpose(1, 2), h[:, channels].T)
        v = mixed.transpose(1, 2) + bias[channels] * v
    return (v * x0) @ state["out_proj.weight"].T + state["out_proj.bias"]
