import dataclasses
import itertools

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from sd_hyena.distil.data import (
    UNCONDITIONAL_SHARE,
    Bank,
    GaussianTokens,
    Lessons,
    States,
    captions_of,
    make_bank,
    trained_pictures,
)
from sd_hyena.distil.stages import Layerwise
from sd_hyena.errors import BadInput
from sd_hyena.models.example_prompts import split_prompts
from sd_hyena.models.latents import encoded, resized
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.sites import find_sites, select
from sd_hyena.students.teacher import Teacher
from tests.conftest import IN01

PROMPTS = ["a red circle on blue", "two green squares on white", "a black triangle on red"]


@pytest.fixture
def bank():
    torch.manual_seed(0)
    return Bank(torch.randn(5, 4, 6, 8), {"encoder_hidden_states": torch.randn(3, 7, 9)}, torch.tensor([0, 1, 0, 1, 0]))


@pytest.fixture
def scheduler():
    return DDPMScheduler(num_train_timesteps=1000)


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


def test_validation_latents_are_never_trained_on(bank):
    train, held_out = bank.split()
    assert len(train) == 4 and len(held_out) == 1
    assert not any(torch.equal(a, b) for a in train.latents for b in held_out.latents)
    one = Bank(bank.latents[:1], bank.text, bank.prompt[:1])
    assert all(len(part) == 1 for part in one.split())


def test_gaussian_tokens_are_standard_normal_and_seeded():
    stream = GaussianTokens({"a": (500, 8), "b": (50, 4)}, seed=3)
    x = stream.sample(7)
    assert x["a"].shape == (500, 8) and abs(x["a"].mean()) < 0.1 and abs(x["a"].std() - 1) < 0.1
    assert equal(x, take(GaussianTokens({"a": (500, 8), "b": (50, 4)}, seed=3).part(7), 1)[0])


def config(**options):
    return TrainConfig(**{**dict(width=64, num_samples=3, sample_steps=2, batch_size=4, seed=0), **options})


def test_samples_are_drawn_once_and_cached_by_what_they_depend_on(pipe, tmp_path):
    first = make_bank(pipe, config(), PROMPTS, "hash", tmp_path)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = make_bank(pipe, config(lr=5e-4, n_steps=7), PROMPTS, "hash", tmp_path)
    assert not calls and torch.equal(first.latents, again.latents)
    for changed, sha256 in ((config(sample_steps=3), "hash"), (config(), "other"), (config(num_samples=2), "hash")):
        calls.clear()
        make_bank(pipe, changed, PROMPTS, sha256, tmp_path)
        assert calls
    hook.remove()
    assert first.latents.shape == (3, 4, 8, 8) and first.text["encoder_hidden_states"].shape[0] == 4


def test_a_drawn_sample_does_not_depend_on_how_many_are_drawn(pipe, tmp_path):
    few = make_bank(pipe, config(num_samples=4), PROMPTS, "", tmp_path).split()[0].latents
    more = make_bank(pipe, config(num_samples=8), PROMPTS, "", tmp_path).split()[0].latents
    assert len(few) == 3 and len(more) == 6
    torch.testing.assert_close(few, more[:3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prompts, pictures", [(64, 32), (64, 256), (5, 3), (2, 2), (1, 4)])
def test_held_out_pictures_have_captions_that_are_never_trained_on(prompts, pictures):
    """Nor does an evaluation, which takes its captions from the same last quarter of the prompts."""
    given = [f"prompt {i % prompts}" for i in range(2 * prompts)]  # each of them twice
    captions, n = captions_of(given, pictures), trained_pictures(pictures)
    assert len(captions) == pictures
    if prompts > 1:
        assert not set(captions[:n]) & set(captions[n:])
        assert set(captions[n:]) <= set(split_prompts(given)[1])


def test_trajectories_are_the_states_of_the_sampler(pipe, tmp_path):
    bank = make_bank(pipe, config(data="trajectories", sample_steps=4), PROMPTS, "", tmp_path)
    assert len(bank) == 4 * 3 and bank.latents.shape[1:] == (4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    expected = [int(t) for t in pipe.scheduler.timesteps for _ in range(3)]
    assert bank.timesteps.tolist() == expected and bank.prompt.tolist() == [0, 1, 2] * 4
    for i in range(3):  # from pure noise, each state one sampler step after the one before
        assert torch.equal(bank.latents[i], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)))
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0][:3].clone()))
    make_bank(pipe, config(data="trajectories", sample_steps=4), PROMPTS, "again", tmp_path)
    hook.remove()
    torch.testing.assert_close(bank.latents, torch.cat(seen))


def test_a_picture_is_either_trained_on_or_validated_with_in_all_its_states(pipe, tmp_path):
    train, held_out = make_bank(pipe, config(data="trajectories", sample_steps=4), PROMPTS, "", tmp_path).split()
    assert len(train) == 8 and len(held_out) == 4
    assert not set(train.picture.tolist()) & set(held_out.picture.tolist())


def test_images_of_a_folder_are_encoded_with_their_captions(pipe, tmp_path):
    rng = np.random.default_rng(0)
    for name, mode, shape in (
        ("a.png", "RGB", (90, 120, 3)),
        ("b.jpg", "L", (64, 64)),
        ("c.webp", "RGBA", (70, 80, 4)),
    ):
        image = Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8), mode)
        image.save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a red circle on blue\n")
    (tmp_path / "notes.md").write_text("not an image")
    bank = make_bank(pipe, config(data="images", data_path=str(tmp_path), width=72, height=64), PROMPTS, "", tmp_path)
    assert bank.latents.shape == (3, 4, 8, 9) and bank.prompt.tolist() == [0, 1, 1]
    text = bank.text["encoder_hidden_states"]
    torch.testing.assert_close(text[1], text[-1])  # no caption is the empty prompt


@pytest.mark.parametrize("content", [b"", b"text", b"\x89PNG\r\n\x1a\n broken"])
def test_an_unreadable_image_is_named(pipe, tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"x\.png"):
        make_bank(pipe, config(data="images", data_path=str(tmp_path)), PROMPTS, "", tmp_path)


def test_latents_of_a_file_are_used_and_must_fit(pipe, tmp_path):
    latents = torch.randn(3, 4, 8, 8)
    save_file({"latents": latents}, tmp_path / "x.safetensors")
    given = config(data="latents", data_path=str(tmp_path / "x.safetensors"))
    assert torch.equal(make_bank(pipe, given, PROMPTS, "", tmp_path).latents, latents)
    with pytest.raises(BadInput, match=r"expected `latents` \(N, 4, 9, 8\)"):
        make_bank(pipe, dataclasses.replace(given, height=72), PROMPTS, "", tmp_path)


def test_resizing_goes_through_pixels(pipe):
    latents = encoded(pipe, torch.rand(1, 3, 64, 64) * 2 - 1)
    assert resized(pipe, latents, 64, 64) is latents
    assert resized(pipe, latents, 96, 72).shape == (1, 4, 9, 12)


def test_the_datamodule_turns_states_into_activations_of_every_site(unet, bank, scheduler):
    sites = select(find_sites(unet), "IN01,M00")
    text = Bank(bank.latents, {"encoder_hidden_states": torch.randn(3, 32, 96)}, bank.prompt)
    data = Lessons(Layerwise(Teacher(unet, sites)), scheduler, text, config(), validation_size=6)
    batches = list(data.val_dataloader())
    timesteps = torch.cat([batch["timestep"] for batch in batches])
    assert timesteps.tolist() == [83, 250, 416, 583, 750, 916]
    activations = data.on_after_batch_transfer(batches[0], 0)
    assert list(activations) == [site.name for site in sites]
    assert activations[IN01].input.shape == (4, 48, 32) and activations[IN01].size == (6, 8)
    assert torch.equal(activations[IN01].timestep, timesteps[:4])


def test_halving_keeps_a_divisor_of_the_batch(unet, bank, scheduler):
    data = Lessons(Layerwise(Teacher(unet, find_sites(unet))), scheduler, bank, config(batch_size=15))
    sizes = [data.micro_batch_size]
    while data.halve():
        sizes.append(data.micro_batch_size)
    assert sizes == [15, 5, 1] and data.accumulate == 15
