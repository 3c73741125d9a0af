import itertools

import numpy as np
import torch
from torch.utils.data import DataLoader

from sd_hyena.distil.bank import Bank
from sd_hyena.distil.streams import UNCONDITIONAL_SHARE, GaussianTokens, States


def take(stream, n):
    return list(itertools.islice(stream, n))


def equal(a, b):
    same = lambda x, y: equal(x, y) if isinstance(x, dict) else torch.equal(x, y)
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


def test_sample_i_depends_on_the_seed_and_i_alone(bank, scheduler):
    first = take(States(bank, scheduler, seed=5), 6)
    later = take(States(bank, scheduler, seed=5).part(4), 2)
    assert equal(first[4], later[0]) and equal(first[5], later[1])
    assert not equal(first[0], take(States(bank, scheduler, seed=6), 1)[0])
    state = torch.get_rng_state()
    take(States(bank, scheduler, seed=5), 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_ranks_that_take_blocks_in_turn_see_the_stream_of_one(bank, scheduler):
    whole = take(States(bank, scheduler, seed=1), 8)
    ranks = [take(States(bank, scheduler, seed=1).part(start=2 * rank, block=2, stride=4), 4) for rank in (0, 1)]
    order = [sample for i in (0, 2) for rank in ranks for sample in rank[i : i + 2]]
    assert all(map(equal, whole, order))


def test_batches_are_the_same_samples_whatever_their_size(bank, scheduler):
    def latents(size):
        loader = DataLoader(States(bank, scheduler, seed=2), batch_size=size)
        return torch.cat([batch["latents"] for batch in take(loader, 12 // size)])

    assert torch.equal(latents(3), latents(4)) and torch.equal(latents(3), latents(12))


def test_states_are_noised_as_the_scheduler_says_with_and_without_their_caption(bank, scheduler):
    samples = take(States(bank, scheduler, seed=0), 400)
    timesteps = torch.stack([s["timestep"] for s in samples]).float()
    assert abs(timesteps.mean() - 500) < 50 and timesteps.min() < 50 and timesteps.max() > 950
    empty = np.mean([equal(s["text"], s["empty"]) for s in samples])
    assert torch.equal(samples[0]["empty"]["encoder_hidden_states"], bank.text["encoder_hidden_states"][-1])
    assert abs(empty - UNCONDITIONAL_SHARE) < 0.1
    for s in samples[:20]:
        kept = scheduler.alphas_cumprod[s["timestep"]]
        noise = [(s["latents"] - kept.sqrt() * x0) / (1 - kept).sqrt() for x0 in bank.latents]
        assert min(abs(n.std() - 1) for n in noise) < 0.25


def test_noisy_banks_are_given_as_they_are(bank, scheduler):
    states = Bank(bank.latents, bank.text, bank.prompt, torch.tensor([10, 20, 30, 40, 50]))
    for s in take(States(states, scheduler, seed=0), 20):
        (n,) = [i for i, x in enumerate(bank.latents) if torch.equal(x, s["latents"])]
        assert s["timestep"] == states.timesteps[n]


def test_gaussian_tokens_are_standard_normal_and_seeded():
    stream = GaussianTokens({"a": (500, 8), "b": (50, 4)}, seed=3)
    x = stream.sample(7)
    assert x["a"].shape == (500, 8) and abs(x["a"].mean()) < 0.1 and abs(x["a"].std() - 1) < 0.1
    assert equal(x, take(GaussianTokens({"a": (500, 8), "b": (50, 4)}, seed=3).part(7), 1)[0])
