import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sd_hyena.distil import sources
from sd_hyena.distil.counted import PictureCost
from sd_hyena.distil.sources import Source, make_bank
from sd_hyena.errors import BadInput
from sd_hyena.files import hashes
from sd_hyena.models.latents import encoded, resized
from sd_hyena.options.train_config import TrainConfig
from sd_hyena.processes.progress import Work

PROMPTS = ["a red circle on blue", "two green squares on white", "a black triangle on red"]


def config(**options):
    return TrainConfig(**{**dict(width=64, num_samples=3, sample_steps=1, batch_size=4, seed=0), **options})


def test_samples_are_drawn_once_and_cached_by_what_they_depend_on(pipe, tmp_path):
    first = make_bank(pipe, config(), PROMPTS, "hash", tmp_path)
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    again = make_bank(pipe, config(lr=5e-4, n_steps=7), PROMPTS, "hash", tmp_path)
    assert not calls and torch.equal(first.latents, again.latents)
    for changed, sha256 in ((config(sample_steps=2), "hash"), (config(), "other"), (config(num_samples=2), "hash")):
        calls.clear()
        make_bank(pipe, changed, PROMPTS, sha256, tmp_path)
        assert calls
    hook.remove()
    assert first.latents.shape == (3, 4, 8, 8) and first.text["encoder_hidden_states"].shape[0] == 4


@pytest.mark.gate
def test_a_drawn_sample_does_not_depend_on_how_many_are_drawn(pipe, tmp_path):
    few = make_bank(pipe, config(num_samples=4), PROMPTS, "", tmp_path).split()[0].latents
    more = make_bank(pipe, config(num_samples=8), PROMPTS, "", tmp_path).split()[0].latents
    assert len(few) == 3 and len(more) == 6
    torch.testing.assert_close(few, more[:3], rtol=1e-3, atol=1e-3)


def test_trajectories_are_the_states_of_the_sampler(pipe, tmp_path):
    bank = make_bank(pipe, config(data="trajectories", sample_steps=4, draw_at_once=3), PROMPTS, "", tmp_path)
    assert len(bank) == 4 * 3 and bank.latents.shape[1:] == (4, 8, 8)
    pipe.scheduler.set_timesteps(4)
    expected = [int(t) for t in pipe.scheduler.timesteps for _ in range(3)]
    assert bank.timesteps.tolist() == expected and bank.prompt.tolist() == [0, 1, 2] * 4
    for i in range(3):  # from pure noise, each state one sampler step after the one before
        assert torch.equal(bank.latents[i], torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(i)))
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0][:3].clone()))
    make_bank(pipe, config(data="trajectories", sample_steps=4, draw_at_once=3), PROMPTS, "again", tmp_path)
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


def test_a_dry_run_encodes_two_of_a_folder_s_pictures_and_tells_of_all_without_reading_them(
    pipe, tmp_path, monkeypatch
):
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")
    whole = config(data="images", data_path=str(tmp_path / "pictures"), num_samples=2)
    dry, read, sha256 = dataclasses.replace(whole, dry_run=True), [], hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda path, *rest: read.append(path.name) or sha256(path, *rest))
    assert Source.missing_of(dry, PROMPTS, "", tmp_path) == 5 and read == []
    few = make_bank(pipe, dry, PROMPTS, "", tmp_path)
    assert len(few) == 2 and read == ["0.png", "1.png"]
    every = make_bank(pipe, whole, PROMPTS, "", tmp_path)
    assert len(every) == 5 and torch.equal(every.latents[:2], few.latents)
    assert Source.missing_of(whole, PROMPTS, "", tmp_path) == 0


def test_the_steps_of_a_picture_are_shown_as_the_share_of_its_work_that_they_are(pipe, tmp_path, monkeypatch):
    """By the operations counted for it: a picture of 1024 px is mostly the work of the VAE."""
    told = {}

    def steps_are_done(pipe, x, width, _height):
        cost = PictureCost(pipe, given)
        told[width] = shown.done, cost.steps / (cost.steps + cost.encoding)
        return x

    monkeypatch.setattr(sources, "resized", steps_are_done)
    for width in (128, 512, 1024):
        given, shown = config(width=width, sample_steps=4), Work("x", 3)
        sources._draw_images(pipe, given, PROMPTS, range(1), shown)
    assert all(done == pytest.approx(share) for done, share in told.values())
    assert told[128][0] == 1 > told[512][0] > 0.2 > told[1024][0]
