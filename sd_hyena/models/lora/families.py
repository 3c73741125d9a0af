"""What the families of LoRA files do to a weight W (out, in) or (out, in, kh, kw): each as its change, W' - W.

LoRA (Hu et al. 2021), LoCon with its CP form, LoHa and LoKr (LyCORIS, Yeh et al. 2023), OFT (Qiu et al. 2023), BOFT (Liu et
al. 2023), (IA)³ (Liu et al. 2022), GLoRA (Chavan et al. 2023), whole differences; around any of them DoRA (Liu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]  # of one module, by their part in the family
BESIDE = ("alpha", "scale", "dora_scale", "diff_b")  # what any family may have


class Family(NamedTuple):
    """A family: the tensors that it needs and may have, its change (of its own scale), and what alpha is divided by."""

    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    change: Callable[[Tensors, Tensor], Tensor]
    rank: Callable[[Tensors], int | None] = lambda t: None


def low_rank(t: Tensors) -> tuple[Tensor, Tensor]:
    """A LoRA's two factors (r, in, ...), (out, r). CP's core (r, r, kh, kw) is multiplied into the first."""
    down, up = t["lora_down"], t["lora_up"].flatten(1)
    if "lora_mid" in t:
        down = torch.einsum("i j h w, j n -> i n h w", t["lora_mid"], down.flatten(1))
    return down, up


def _lora(t: Tensors, weight: Tensor) -> Tensor:
    down, up = low_rank(t)
    return up @ down.flatten(1)


def _loha(t: Tensors, weight: Tensor) -> Tensor:
    from lycoris.functional import loha

    factors = [t[f"hada_w{n}_{side}"] for n in (1, 2) for side in "ba"]
    return loha.diff_weight(*factors, t.get("hada_t1"), t.get("hada_t2"), gamma=torch.tensor(1.0), backend="torch")


def _lokr(t: Tensors, weight: Tensor) -> Tensor:
    from lycoris.functional import lokr

    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    return lokr.kron_weight(*(t.get(f"lokr_{name}") for name in names), backend="torch")


def _lokr_rank(t: Tensors) -> int | None:
    """Of the half that is factorised; two whole halves have no scale."""
    factors = [t[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in t]
    return len(factors[0]) if factors else None


def _oft(t: Tensors, weight: Tensor) -> Tensor:
    """Blocks Q (n, b, b) of one rotation, or (m, n, b, b) of m butterflies. Alpha is no scale but the longest Q, per row."""
    from lycoris.functional import boft, diag_oft

    blocks = t["oft_blocks"]
    kind = diag_oft if blocks.ndim == 3 else boft
    longest = float(t.get("alpha", 0)) * len(weight)
    return kind.diff_weight(weight, blocks, _column(t.get("rescale"), weight), constraint=longest, backend="torch")


def _rotated(t: Tensors, weight: Tensor) -> Tensor:
    """OFT of LyCORIS before 2.0: the rotations (n, b, b) themselves."""
    rotation = t["oft_diag"]
    rotated = torch.einsum("k n m, k n r -> k m r", rotation, weight.reshape(*rotation.shape[:2], -1))
    rotated = rotated.reshape(weight.shape)
    return (rotated * _column(t["rescale"], weight) if "rescale" in t else rotated) - weight


def _ia3(t: Tensors, weight: Tensor) -> Tensor:
    factor = t["weight"].flatten()
    return weight * (_row(factor, weight) if bool(t["on_input"]) else _column(factor, weight))


def _ia3_of_peft(t: Tensors, weight: Tensor) -> Tensor:
    """PEFT's factor is of the weight itself, LyCORIS' of its change."""
    factor = t["ia3_l"].flatten()
    return weight * ((_column if _of_outputs(t, weight) else _row)(factor, weight) - 1)


def _of_outputs(t: Tensors, weight: Tensor) -> bool:
    """Of a linear layer PEFT's factor is (out, 1) or (1, in), of a convolution (1, out, 1, 1) or (1, in, 1, 1)."""
    factor = t["ia3_l"]
    return factor.numel() == len(weight) and (factor.ndim != 2 or len(factor) == len(weight))


def _glora(t: Tensors, weight: Tensor) -> Tensor:
    """W A + B, each of two factors; LyCORIS before 2.0 wrote them the other way round."""
    a1, a2, b1, b2 = (t[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if len(b1) != len(weight):
        a1, a2, b1, b2 = a2, a1, b2, b1
    narrow = torch.einsum("o i ..., i r -> o r ...", weight, a1)
    return torch.einsum("o r ..., r i -> o i ...", narrow, a2) + (b1 @ b2).reshape(weight.shape)


def _column(factor: Tensor | None, weight: Tensor) -> Tensor | None:
    """One number for each output."""
    return None if factor is None else factor.reshape(-1, *[1] * (weight.ndim - 1))


def _row(factor: Tensor, weight: Tensor) -> Tensor:
    """One number for each input."""
    return factor.reshape(1, -1, *[1] * (weight.ndim - 2))


_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR_FACTORS = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
FAMILIES = (  # the first whose needs are met
    Family("LoRA", ("lora_up", "lora_down"), ("lora_mid",), _lora, lambda t: len(t["lora_down"])),
    Family("LoHa", _HADAMARD, ("hada_t1", "hada_t2"), _loha, lambda t: len(t["hada_w1_b"])),
    *(
        Family("LoKr", (*one, *two), _LOKR_FACTORS, _lokr, _lokr_rank)
        for one in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for two in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    Family("OFT", ("oft_blocks",), ("rescale",), _oft),
    Family("OFT", ("oft_diag",), ("rescale",), _rotated),
    Family("(IA)³", ("weight", "on_input"), (), _ia3),
    Family("(IA)³", ("ia3_l",), (), _ia3_of_peft),
    Family(
        "GLoRA",
        ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
        (),
        _glora,
        lambda t: min(t["b1.weight"].shape[:2]),
    ),
    Family("a whole difference", ("diff",), (), lambda t, weight: t["diff"]),
    Family("a norm's difference", ("w_norm",), ("b_norm",), lambda t, weight: t["w_norm"]),
    Family("a bias' difference", ("diff_b",), (), lambda t, weight: torch.zeros_like(weight)),
    Family("a bias' difference", ("b_norm",), (), lambda t, weight: torch.zeros_like(weight)),
)
KNOWN = {name for family in FAMILIES for name in (*family.needs, *family.may)} | set(BESIDE)


def family_of(names: set[str]) -> Family | None:
    return next((family for family in FAMILIES if names.issuperset(family.needs)), None)


def scale_of(family: Family, t: Tensors) -> float:
    """What a change is multiplied by: its file's scale, or alpha by rank; alpha 0 is no alpha, as in LyCORIS."""
    rank, alpha = family.rank(t), float(t.get("alpha", 0))
    if "scale" in t:
        return float(t["scale"])
    return alpha / rank if rank and alpha else 1.0


def decomposed(weight: Tensor, change: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA's change: W + change, its rows (or columns, if the magnitudes are so many) given other lengths."""
    from lycoris.functional.general import weight_decompose

    rows = _of_rows(weight, magnitude)
    shaped = (_column if rows else _row)(magnitude.flatten(), weight)
    return weight_decompose(weight + change, shaped, 1, rows, backend="torch") - weight


def _of_rows(weight: Tensor, magnitude: Tensor) -> bool:
    """Whether magnitudes belong to outputs: by their number, else by their shape, (out, 1, ...) or (1, in, ...)."""
    rows, columns = (magnitude.numel() == length for length in weight.shape[:2])
    return rows and not (columns and magnitude.ndim > 1 and len(magnitude) == 1)


def bias_change(t: Tensors, weight: Tensor, bias: Tensor) -> Tensor | None:
    """What a module's tensors add to its bias (out,); None if they leave it."""
    for part in ("diff_b", "b_norm"):
        if part in t:
            return t[part].reshape(bias.shape)
    return bias * (t["ia3_l"].flatten() - 1) if "ia3_l" in t and _of_outputs(t, weight) else None


def shape_of(family: Family, t: Tensors, weight: Tensor) -> tuple[int, ...] | None:
    """Of a module's change, told without computing it; None where its tensors do not go with each other or the weight."""
    t = {name: one if name == "on_input" else one.to("meta") for name, one in t.items() if name not in BESIDE}
    try:
        return tuple(family.change(t, weight.to("meta")).shape)
    except (RuntimeError, ValueError, IndexError):
        return None


def weight_change(family: Family, t: Tensors, weight: Tensor) -> Tensor:
    """What a module's tensors, float32, that fit add to its weight (float32), at strength 1; of the weight's shape."""
    change = (scale_of(family, t) * family.change(t, weight)).reshape(weight.shape)
    return decomposed(weight, change, t["dora_scale"]) if "dora_scale" in t else change
