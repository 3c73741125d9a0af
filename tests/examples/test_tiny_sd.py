"""The shipped teacher's scenes and their judge. The judge was frozen before the teacher was trained."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from examples.tiny_sd.checker import faults, is_right
from examples.tiny_sd.scenes import COLOURS, SHAPES, WORDS, Caption, draw, numbered_scene, random_scene
from examples.tiny_sd.train import HELD_OUT_SEED, build_tokenizer, to_tensor, tokenize
from sd_hyena.options.shipped import SHIPPED_MODEL
from tests.gate import sampled

SCENES = [numbered_scene(7, i) for i in range(200)]
SMALL = 128, 128  # pixels: a fifth of the time


@pytest.mark.gate
def test_true_renders_pass():
    wrong = [str(s.caption) for s in SCENES[:100] if not is_right(draw(s), s.caption)]
    assert len(wrong) <= 1, wrong


@pytest.mark.gate
def test_renders_with_swapped_captions_fail():
    right = sum(
        is_right(draw(s, *SMALL), other.caption) for s, other in zip(SCENES, SCENES[1:] + SCENES[:1], strict=True)
    )
    assert right <= 0.1 * len(SCENES)


@pytest.mark.parametrize(
    "attribute", sampled(["colour", "shape", "count", "background", "pattern", "side", "mirror"], 6)
)
def test_changing_one_word_of_a_caption_makes_it_wrong(attribute):
    """The hardest swap there is: everything else still fits."""
    rng, right, tried = np.random.default_rng(0), 0, 0
    for scene in SCENES[:120]:
        changed = _changed(scene.caption, attribute, rng)
        if changed is not None:
            tried += 1
            right += is_right(draw(scene, *SMALL), changed)
    assert tried >= 10 and right <= 0.02 * tried


def _changed(caption: Caption, attribute: str, rng) -> Caption | None:
    first, *rest = caption.groups

    def with_first(**change):
        return dataclasses.replace(caption, groups=(dataclasses.replace(first, **change), *rest))

    used = {caption.background, *(group.colour for group in caption.groups)}
    if attribute == "colour":
        return with_first(colour=str(rng.choice([c for c in COLOURS if c not in used])))
    if attribute == "shape":
        return with_first(shape=str(rng.choice([s for s in SHAPES if s != first.shape])))
    if attribute == "count" and not caption.mirrored:
        return with_first(count=first.count % 3 + 1)
    if attribute == "background":
        return dataclasses.replace(caption, background=str(rng.choice([c for c in COLOURS if c not in used])))
    if attribute == "pattern":
        other = {"horizontal stripes": "vertical stripes", "vertical stripes": "", "": "horizontal stripes"}
        return dataclasses.replace(caption, pattern=other[caption.pattern])
    if attribute == "side" and caption.relation in ("left of", "right of") and first != rest[0]:
        if (first.colour, first.shape) == (rest[0].colour, rest[0].shape):
            return None
        return dataclasses.replace(caption, relation="right of" if caption.relation == "left of" else "left of")
    if attribute == "mirror" and caption.mirrored:
        return dataclasses.replace(caption, mirrored=False)
    return None


def test_a_mirrored_scene_whose_halves_differ_is_wrong():
    scene = next(s for s in SCENES if s.caption.mirrored)
    half = len(scene.items) // 2
    moved = [dataclasses.replace(item, y=-item.y * 0.5 - 0.15) for item in scene.items[half:]]
    shifted = dataclasses.replace(scene, items=(*scene.items[:half], *moved))
    assert any("halves" in fault for fault in faults(draw(shifted), scene.caption))


def test_noise_and_grey_are_wrong():
    rng = np.random.default_rng(0)
    for scene in SCENES[:20]:
        assert not is_right(rng.integers(0, 255, (*SMALL, 3), dtype=np.uint8), scene.caption)
        assert not is_right(np.full((*SMALL, 3), 128, np.uint8), scene.caption)


def test_a_caption_is_read_back_and_other_text_is_refused():
    for scene in SCENES:
        assert Caption.parse(str(scene.caption)) == scene.caption
    for text in ("", "a cat", "a red circle", "four red circles on blue", "a red circle on blue on green"):
        with pytest.raises(ValueError, match="not a caption"):
            Caption.parse(text)


@pytest.mark.gate
def test_scenes_can_be_drawn_at_any_size_and_are_judged_there_too():
    for scene in SCENES[:10]:
        for width, height in ((128, 128), (384, 256), (256, 512)):
            assert draw(scene, width, height).shape == (height, width, 3)
            assert is_right(draw(scene, width, height), scene.caption)


def test_scene_i_depends_on_its_seed_and_number_alone():
    assert numbered_scene(3, 5) == numbered_scene(3, 5) != numbered_scene(3, 6)
    rng = np.random.default_rng(0)
    placed = {random_scene(SCENES[0].caption, rng) for _ in range(5)}
    assert len(placed) == 5


def test_every_word_is_one_token_and_any_text_has_tokens():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    ids = tokenize(tokenizer, ["a red circle on blue", "größe 猫", ""])
    assert ids.shape == (3, 32) and ids[0, 0] == tokenizer.bos_token_id and (ids < len(tokenizer)).all()
    shipped = type(tokenizer).from_pretrained(SHIPPED_MODEL / "tokenizer")
    assert torch.equal(
        tokenize(shipped, ["two green squares on white"]), tokenize(tokenizer, ["two green squares on white"])
    )


@pytest.mark.gate
@pytest.mark.parametrize("n, wrong", [(8, 2), pytest.param(100, 5, marks=pytest.mark.slow)])
def test_the_shipped_vae_keeps_held_out_scenes(n, wrong):
    """The card's bar: 25 dB, and 95 of a hundred captions still right; of the first eight two are wrong.

    A hundred are slow: they take twelve times as long, of weights that do not change."""
    vae = AutoencoderKL.from_pretrained(SHIPPED_MODEL / "vae").float().eval()
    psnr, right = [], 0
    for i in range(n):
        scene = numbered_scene(HELD_OUT_SEED, i)
        x = to_tensor(draw(scene))[None]
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(-10 * ((y - x) / 2).square().mean().log10().item())
        right += is_right(((y[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy(), scene.caption)
    assert np.mean(psnr) >= 25 and n - right <= wrong


def test_the_shipped_prompts_are_captions():
    prompts = (SHIPPED_MODEL / "prompts.txt").read_text().splitlines()
    assert len(prompts) >= 32 and all(Caption.parse(prompt) for prompt in prompts)
