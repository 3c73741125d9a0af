"""The definitions, in O(L^2) and plain loops. Imported by tests only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from safari.clusters import spread


def long_conv(u: Tensor, h: Tensor, first_lag: int = 0) -> Tensor:
    """`y[t] = sum_j h[j] u[t - first_lag - j]`, with u zero outside 0 ... L-1."""
    length, taps = u.shape[-1], h.shape[-1]
    y = []
    for t in range(length):
        terms = [h[..., j] * u[..., t - first_lag - j] for j in range(taps) if 0 <= t - first_lag - j < length]
        y.append(sum(terms, torch.zeros_like(u[..., 0] * h[..., 0])))
    return torch.stack(y, dim=-1)


def causal_filter(state: dict[str, Tensor], length: int, normalized: bool = False) -> Tensor:
    """safari's implicit filter from the weights alone, its positions computed anew; (length, C).

    l_max is the number of stored positions. `normalized`: the taps of all channels at a lag, windowed, add up to 1.
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
        h = h * torch.exp(-t * state["filter_fn.modulation.deltas"].flatten().abs())
        rows.append(h / sum(tap.abs() for tap in h) if normalized else h)
    return torch.stack(rows)


def hyena_operator(state: dict[str, Tensor], x: Tensor, order: int = 2, normalized: bool = False) -> Tensor:
    """safari's causal operator with default options but these, from a state dict; x (B, L, D)."""
    d_model, length = x.shape[-1], x.shape[1]
    u = x @ state["in_proj.weight"].T + state["in_proj.bias"]
    taps = state["short_filter.weight"][:, 0]
    u = torch.nn.functional.pad(u, (0, 0, taps.shape[1] - 1, 0))
    u = sum(taps[:, k] * u[:, k : k + length] for k in range(taps.shape[1])) + state["short_filter.bias"]
    streams = [u[..., i * d_model : (i + 1) * d_model] for i in range(order + 1)]
    x0, gates, v = streams[0], streams[1:order], streams[order]
    h, bias = causal_filter(state, length, normalized), state["filter_fn.bias"]
    for o, gate in enumerate(reversed(gates)):
        channels = torch.arange(d_model) * (order - 1) + o  # laid out (v o), v outer
        v = gate * v
        mixed = long_conv(v.transpose(1, 2), h[:, channels].T)
        v = mixed.transpose(1, 2) + bias[channels] * v
    return (v * x0) @ state["out_proj.weight"].T + state["out_proj.bias"]


def long_conv2d(u: Tensor, h: Tensor) -> Tensor:
    """`y[i] = sum_D h[D] u[i - D]` over the filter's offsets, centred, with u zero outside its grid."""
    (height, width), (down, right) = u.shape[-2:], (side // 2 for side in h.shape[-2:])
    y = []
    for row in range(height):
        for column in range(width):
            terms = [
                h[..., row - a + down, column - b + right] * u[..., a, b]
                for a in range(height)
                for b in range(width)
                if abs(row - a) <= down and abs(column - b) <= right
            ]
            y.append(sum(terms))
    return torch.stack(y, dim=-1).unflatten(-1, (height, width))


def linear_attention(q: Tensor, k: Tensor, v: Tensor, epsilon: float = 1e-4) -> Tensor:
    """All L^2 weights q_i . k_j / L, each row divided by its sum plus epsilon; (B, heads, L, E), q and k positive."""
    weight = q @ k.transpose(-1, -2) / k.shape[-2]
    return weight / (weight.sum(dim=-1, keepdim=True) + epsilon) @ v


def window_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, size: tuple[int, int], window: int) -> Tensor:
    """Softmax attention, window by window and head by head; a window ends where the grid ends."""
    (height, width), e = size, q.shape[-1] // heads
    y = torch.zeros_like(v)
    for top in range(0, height, window):
        for left in range(0, width, window):
            rows, columns = range(top, min(top + window, height)), range(left, min(left + window, width))
            cells = [row * width + column for row in rows for column in columns]
            for head in range(heads):
                part = slice(head * e, (head + 1) * e)
                score = q[:, cells, part] @ k[:, cells, part].transpose(1, 2) / math.sqrt(e)
                weight = score.exp() / score.exp().sum(dim=-1, keepdim=True)
                y[:, cells, part] = weight @ v[:, cells, part]
    return y


def offset_filter(state: dict[str, Tensor], reaches: tuple[int, ...]) -> Tensor:
    """`OffsetFilter` from its weights, offset by offset; (C, 2 r + 1) or (C, 2 r_y + 1, 2 r_x + 1)."""
    bands = state["first.weight"].shape[1] // (2 * len(reaches))
    wavelengths = [4 * 64 ** (band / max(bands - 1, 1)) for band in range(bands)]  # cells
    offsets = [()]
    for reach in reaches:
        offsets = [(*offset, d) for offset in offsets for d in range(-reach, reach + 1)]
    h = []
    for offset in offsets:
        angles = [2 * math.pi * d / wavelength for d in offset for wavelength in wavelengths]
        z = [*(math.cos(angle) for angle in angles), *(math.sin(angle) for angle in angles)]
        z = torch.tensor(z, dtype=state["first.weight"].dtype)
        z = torch.sin(state["first.weight"] @ z + state["first.bias"])
        z = torch.sin(state["hidden.weight"] @ z + state["hidden.bias"])
        h.append(state["last.weight"] @ z * torch.exp(-math.hypot(*offset) * state["log_rate"].exp()))
    return torch.stack(h, dim=-1).unflatten(-1, [2 * reach + 1 for reach in reaches])


def depthwise(t: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Correlation of each channel of (B, D, H, W) with its own square, the border cells repeated outwards."""
    (height, width), side = t.shape[-2:], weight.shape[-1]
    y = bias[:, None, None] * torch.ones_like(t)
    for a in range(side):
        for b in range(side):
            rows = [min(max(row + a - side // 2, 0), height - 1) for row in range(height)]
            columns = [min(max(column + b - side // 2, 0), width - 1) for column in range(width)]
            y = y + weight[:, 0, a, b, None, None] * t[:, :, rows][..., columns]
    return y


def head_norm(t: Tensor, gain: Tensor, heads: int) -> Tensor:
    """Each cell of (B, D, H, W) over the root of the mean square of its channels, head by head."""
    parts = [part / (part.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() for part in t.chunk(heads, dim=1)]
    return gain * torch.cat(parts, dim=1)


def content(state: dict[str, Tensor], streams: tuple[Tensor, ...], x: Tensor, heads: int) -> Tensor:
    """`LinearAttention` with any options, from its weights; (B, L, D)."""

    def shifted(stream: Tensor, f: str) -> Tensor:
        z = x @ state[f"{f}.0.weight"].T + state[f"{f}.0.bias"]
        z = z - z.mean(dim=-1, keepdim=True)
        z = z / (z.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        z = z * state[f"{f}.1.weight"] + state[f"{f}.1.bias"]
        z = torch.where(z > 0, z, 0.01 * z)
        return stream + z @ state[f"{f}.3.weight"].T + state[f"{f}.3.bias"]

    def features(z: Tensor, phi: str, head: int) -> Tensor:
        if f"{phi}.weight" not in state:
            return torch.where(z > 0, z + 1, z.clamp(max=0).exp())
        z = z @ state[f"{phi}.weight"][head] / z.shape[-1] ** 0.25
        return torch.cat([part.exp() / part.exp().sum(dim=-1, keepdim=True) for part in (z, -z)], dim=-1)

    q, k, v = shifted(streams[0], "f_q"), shifted(streams[1], "f_k"), streams[2]
    parts = zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True)
    y = [
        linear_attention(features(q_, "phi_q", head), features(k_, "phi_k", head), v_)
        for head, (q_, k_, v_) in enumerate(parts)
    ]
    return torch.cat(y, dim=-1)


def landmark_attention(state: dict[str, Tensor], streams: tuple[Tensor, ...], heads: int) -> Tensor:
    """`LandmarkAttention` from its weights, every matrix of weights in full; (B, L, D)."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in streams)

    def weights(a: Tensor, b: Tensor) -> Tensor:
        z = (a @ b.transpose(-1, -2) / k.shape[-1] ** 0.5).exp()
        return z / z.sum(dim=-1, keepdim=True)

    gather = weights(state["seek"], k)
    far_k, far_q = state["a_k"] * (gather @ k) + state["b_k"], state["a_q"] * (gather @ q) + state["b_q"]
    between, ridge = weights(far_q, far_k), state["log_ridge"].exp()
    damped = between.transpose(-1, -2) @ between + ridge**2 * torch.eye(between.shape[-1], dtype=k.dtype)
    inverse = torch.linalg.inv(damped) @ between.transpose(-1, -2)
    return (weights(q, far_k) @ inverse @ weights(far_q, k) @ v).transpose(1, 2).flatten(2)


def clusters(keys: Tensor, m: int, steps: int) -> list[list[int]]:
    """The members of each of m clusters of keys (L, E) by Lloyd's iteration from the first m keys."""
    centers = [keys[i] for i in range(m)]
    for _ in range(steps):
        members = [[] for _ in range(m)]
        for i, key in enumerate(keys):
            distances = [float((key - center).square().sum()) for center in centers]
            members[distances.index(min(distances))].append(i)
        centers = [keys[them].mean(dim=0) if them else center for them, center in zip(members, centers, strict=True)]
    return members


def cluster_attention(
    state: dict[str, Tensor],
    streams: tuple[Tensor, ...],
    heads: int,
    m: int,
    order: list[int],
    *,
    steps: int,
    ridge: float,
    least: float,
) -> Tensor:
    """`ClusterAttention` sample by sample and head by head, `order` the tokens that are clustered; (B, L, D).

    An empty cluster keeps the token that it started from, and counts as one.
    """
    e = streams[0].shape[-1] // heads

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.T / e**0.5).exp()
        return weights / weights.sum(dim=-1, keepdim=True) @ v

    def one(q: Tensor, k: Tensor, v: Tensor, head: int) -> Tensor:
        if len(k) <= m:
            return attention(q, k, v)
        k = k - k[order].mean(dim=0)
        members = [them or [j] for j, them in enumerate(clusters(k[order].detach(), m, steps))]
        n = torch.tensor([len(them) for them in members], dtype=k.dtype) * len(k) / len(order)
        far_q, far_k, far_v = (torch.stack([t[order][them].mean(dim=0) for them in members]) for t in (q, k, v))
        own_k = far_k
        own_cluster = {i: j for j, them in enumerate(members) for i in them}
        some = range(min(len(order), 512))
        logits = [float(q[order[i]] @ (k[order[x]] - far_k[own_cluster[x]])) / e**0.5 for i in some for x in some]
        damp = ridge * sum(logit**2 for logit in logits) / len(logits)
        if "turn" in state:
            far_k, n = far_k @ state["turn"][head], n * state["log_n"][head].exp().flatten()
            damp = damp * state["log_ridge"][head].exp()

        def weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            """Of the clusters, and of oneself."""
            among = n * (q @ far_k.T / e**0.5).exp()
            own = ((q * k).sum(dim=-1, keepdim=True) / e**0.5).exp()
            total = among.sum(dim=-1, keepdim=True) + own
            return among / total, own / total

        among, own = weights(far_q, own_k)
        missing = attention(far_q, k, v) - (among @ far_v + own * far_v)
        damped = among.T @ among + (damp + least) ** 2 * torch.eye(m, dtype=k.dtype)
        z = far_v + torch.linalg.inv(damped) @ among.T @ missing
        among, own = weights(q, k)
        return among @ z + own * v

    rows = []
    for sample in zip(*streams, strict=True):
        parts = zip(*(t.split(e, dim=-1) for t in sample), strict=True)
        rows.append(torch.cat([one(*part, head) for head, part in enumerate(parts)], dim=-1))
    return torch.stack(rows)


def hyena2d(
    state: dict[str, Tensor],
    streams: tuple[Tensor, ...],
    x: Tensor,
    size: tuple[int, int],
    heads: int,
    *,
    long: str = "none",
    rank: int = 4,
    reach: int = 64,
    window: int = 0,
    landmarks: int = 128,
    **_,
) -> Tensor:
    """`Hyena2d` with any options, from its weights; the options that are not named show in the names of the weights."""
    q, k, v = (t.transpose(1, 2).unflatten(-1, size) for t in streams)

    def inside(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}

    def conv(t: Tensor, name: str) -> Tensor:
        return depthwise(t, state[f"{name}.weight"], state[f"{name}.bias"])

    def gate(t: Tensor, name: str) -> Tensor:
        if f"{name}.a" in state:
            return state[f"{name}.a"] * t + state[f"{name}.b"]
        y = torch.einsum("oi,bihw->bohw", state[f"{name}.weight"][..., 0, 0], t)
        return y + state[f"{name}.bias"][:, None, None]

    def norm(t: Tensor, name: str) -> Tensor:
        return head_norm(t, state[f"{name}.gain"], heads) if f"{name}.gain" in state else t

    def filters(name: str, axes: int, per_channel: int = 1) -> Tensor:
        """One for each of the D channels, (D, per_channel, ...), neighbours sharing theirs in groups."""
        h = offset_filter(inside(f"long.{name}."), (reach,) * axes).unflatten(0, (-1, per_channel))
        return torch.stack([h[channel * len(h) // q.shape[1]] for channel in range(q.shape[1])])

    def far(t: Tensor) -> Tensor:
        if long == "full":
            return long_conv2d(t, filters("filter", 2)[:, 0])
        if long == "separable":
            return long_conv2d(t, torch.einsum("cry,crx->cyx", filters("down", 1, rank), filters("along", 1, rank)))
        return long_conv2d(t, filters("down", 1)[:, 0, :, None]) + long_conv2d(t, filters("along", 1)[:, 0, None, :])

    q, k, v = conv(q, "short_q"), conv(k, "short_k"), conv(v, "short_v")
    u = norm(gate(k, "gate_k") * v, "norm_u")
    mixed = state["skip"] * u
    if "local.weight" in state:
        mixed = mixed + conv(u, "local")
    if long != "none":
        mixed = mixed + far(u - u.mean(dim=(-2, -1), keepdim=True))
    p = state["place_gain"] * norm(gate(q, "gate_q") * mixed, "norm_p")
    y = p.flatten(2).transpose(1, 2)
    if "content.turn" in state:
        order = spread(q[0, 0].numel(), min(q[0, 0].numel(), 2048)).tolist()
        given = {"steps": 2, "ridge": 3e-2, "least": 2e-3}
        y = y + cluster_attention(inside("content."), streams, heads, landmarks, order, **given)
    if "content.seek" in state:
        y = y + landmark_attention(inside("content."), streams, heads)
    if "content.f_q.0.weight" in state:
        y = y + content(inside("content."), streams, x, heads)
    if "window_gate" in state:
        y = y + state["window_gate"] * window_attention(*streams, heads, size, window)
    return y
