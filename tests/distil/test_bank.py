import pytest
import torch

from sd_hyena.distil.bank import Bank, captions_of, trained_pictures
from sd_hyena.models.example_prompts import split_prompts


def test_validation_latents_are_never_trained_on(bank):
    train, held_out = bank.split()
    assert len(train) == 4 and len(held_out) == 1
    assert not any(torch.equal(a, b) for a in train.latents for b in held_out.latents)
    one = Bank(bank.latents[:1], bank.text, bank.prompt[:1])
    assert all(len(part) == 1 for part in one.split())


@pytest.mark.parametrize("prompts, pictures", [(64, 32), (64, 256), (5, 3), (2, 2), (1, 4)])
def test_held_out_pictures_have_captions_that_are_never_trained_on(prompts, pictures):
    """Nor does an evaluation, which takes its captions from the same last quarter of the prompts."""
    given = [f"prompt {i % prompts}" for i in range(2 * prompts)]  # each of them twice
    captions, n = captions_of(given, pictures), trained_pictures(pictures)
    assert len(captions) == pictures
    if prompts > 1:
        assert not set(captions[:n]) & set(captions[n:])
        assert set(captions[n:]) <= set(split_prompts(given)[1])
