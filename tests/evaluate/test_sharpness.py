"""Entropy of attention, held to maps whose entropy is known."""

import math

import pytest
import torch
from torch import nn

from sd_hyena.evaluate.sharpness import entropy
from sd_hyena.students.student import Projections


def projections(scale: float, d: int) -> Projections:
    q, k = (nn.Linear(d, d, bias=False) for _ in range(2))
    nn.init.eye_(q.weight).data.mul_(scale)
    nn.init.eye_(k.weight)
    return Projections(q, k, nn.Identity(), nn.Identity())


def test_it_is_one_for_even_attention_and_falls_to_zero_as_the_logits_grow():
    x = torch.randn(2, 35, 12, generator=torch.Generator().manual_seed(0))
    assert entropy(x, projections(0.0, 12), heads=3) == pytest.approx(1)
    shares = [float(entropy(x, projections(scale, 12), heads=3)) for scale in (0.5, 2, 8, 1e4)]
    assert shares == sorted(shares, reverse=True) and shares[-1] < 0.02


def test_tokens_of_two_kinds_give_the_entropy_of_one_kind():
    x = torch.zeros(1, 24, 8)
    x[:, :16, 0], x[:, 16:, 1] = 1, 1
    share = (16 * math.log(16) + 8 * math.log(8)) / 24 / math.log(24)
    assert entropy(x, projections(1e3, 8), heads=1) == pytest.approx(share, rel=1e-4)
