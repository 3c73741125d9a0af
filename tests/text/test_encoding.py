"""Embeddings of weighted and long prompts against the text encoder called by hand."""

import pytest
import torch
from diffusers import AutoPipelineForImage2Image

from sd_hyena.errors import BadInput
from sd_hyena.large.regions import Region, Texts
from sd_hyena.large.tiled_unet import tiled_diffusion
from sd_hyena.text.encoding import chunks, weighted, weighted_prompts

CPU = torch.device("cpu")
LONG = ", ".join(["a red circle left of two blue squares on green stripes"] * 4)


def by_hand(pipe, text: str, weights: dict[int, float] | None = None, layer: int = 1) -> torch.Tensor:
    """One chunk (1, 32, 96): the tokenizer's own padding, the encoder, weights by position in the chunk, the mean kept."""
    ids = pipe.tokenizer(text, padding="max_length", max_length=32, return_tensors="pt").input_ids
    assert ids.shape == (1, 32)
    output = pipe.text_encoder(ids, output_hidden_states=True)
    states = pipe.text_encoder.final_layer_norm(output.hidden_states[-layer])
    if not weights:
        return states
    emphasised = states.clone()
    for place, weight in weights.items():
        emphasised[0, place] *= weight
    return emphasised * states.mean() / emphasised.mean()


@torch.no_grad()
def encoded(pipe, prompt, negative=None, images=1, guidance=True, clip_skip=1):
    with weighted_prompts(pipe, clip_skip):
        return pipe.encode_prompt(prompt, CPU, images, guidance, negative)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    "prompt, negative",
    [
        ("a red circle", "blue"),
        ("", None),
        ("red " * 30, "blue, " * 15),
        (["a red circle", "on blue"], ["", "two squares"]),
        ("<|endoftext|> a\0 💥", " "),
        ("a: b, c", "\\"),
    ],
)
@pytest.mark.parametrize("guidance", [True, False])
def test_a_prompt_without_weights_is_encoded_by_the_pipeline_itself_bit_for_bit(pipe, prompt, negative, guidance):
    plain = pipe.encode_prompt(prompt, CPU, 2, guidance, negative)
    ours = encoded(pipe, prompt, negative, 2, guidance)
    assert torch.equal(plain[0], ours[0]) and (torch.equal(plain[1], ours[1]) if guidance else ours[1] is None)


def test_a_plain_prompt_stays_bit_equal_beside_a_weighted_one(pipe):
    plain = pipe.encode_prompt("a red circle", CPU, 1, True, "blue")
    positive, _ = encoded(pipe, "a red circle", "(blue:1.3)")
    assert torch.equal(plain[0], positive)
    _, negative = encoded(pipe, "a (red) circle", "blue")
    assert torch.equal(plain[1], negative)


def test_escaped_brackets_reach_the_model_as_brackets(pipe):
    assert torch.equal(encoded(pipe, r"a \(red\) circle")[0], pipe.encode_prompt("a (red) circle", CPU, 1, False)[0])


@pytest.mark.parametrize(
    "prompt, weights",
    [
        ("a (red:1.5) circle", {2: 1.5}),
        ("a [red] circle", {2: 1 / 1.1}),
        ("((a red)) [circle]", {1: 1.21, 2: 1.21, 3: 1 / 1.1}),
        ("a red (circle:0)", {3: 0.0}),
        ("a (red circle", {2: 1.1, 3: 1.1}),
        ("a (red:-1) circle", {2: -1.0}),
    ],
)
def test_weights_multiply_the_states_of_their_words_and_the_mean_stays(pipe, prompt, weights):
    ours, _ = encoded(pipe, prompt)
    torch.testing.assert_close(ours, by_hand(pipe, "a red circle", weights))
    torch.testing.assert_close(ours.mean(), by_hand(pipe, "a red circle").mean())


def test_states_whose_mean_vanishes_are_not_rescaled():
    states = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    assert torch.equal(weighted(states, torch.tensor([1.0, 3.0])), states * torch.tensor([1.0, 3.0])[:, None])
    half = weighted(torch.full((1, 2, 4), 60.0, dtype=torch.float16), torch.tensor([1.0, 1000.0]))
    assert half.dtype == torch.float16 and half.isfinite().all()


def test_a_long_prompt_is_read_in_chunks_and_the_short_one_beside_it_is_padded(pipe):
    ours, negative = encoded(pipe, "red " * 45 + "circle", "on (blue:1.2)")
    expected = torch.cat([by_hand(pipe, "red " * 30), by_hand(pipe, "red " * 15 + "circle")], dim=1)
    assert torch.equal(ours, expected)
    torch.testing.assert_close(negative, torch.cat([by_hand(pipe, "on blue", {2: 1.2}), by_hand(pipe, "")], dim=1))


def test_a_long_negative_prompt_lengthens_the_prompt(pipe):
    ours, negative = encoded(pipe, ["a", "on blue"], ["red " * 61, ""], images=2)
    assert ours.shape == negative.shape == (4, 96, 96)
    empty = by_hand(pipe, "")
    assert torch.equal(ours[2:], torch.cat([by_hand(pipe, "on blue"), empty, empty], dim=1).repeat(2, 1, 1))
    assert torch.equal(negative[1:2], torch.cat([by_hand(pipe, "red " * 30)] * 2 + [by_hand(pipe, "red")], dim=1))


def test_break_ends_a_chunk(pipe):
    ours, _ = encoded(pipe, "a red circle BREAK on (blue:1.4)")
    torch.testing.assert_close(
        ours, torch.cat([by_hand(pipe, "a red circle"), by_hand(pipe, "on blue", {2: 1.4})], dim=1)
    )
    lengths = {"a BREAK": [1], "BREAK a": [0, 1], "a BREAK BREAK on": [1, 0, 1], "BREAK": [0], "": [0]}
    for prompt, expected in lengths.items():
        assert [len(chunk.ids) for chunk in chunks(prompt, pipe.tokenizer)] == expected, prompt


def test_each_chunk_keeps_its_own_mean(pipe):
    ours, _ = encoded(pipe, "(red:2) " * 30 + "(blue:0.5) circle")
    first = by_hand(pipe, "red " * 30, dict.fromkeys(range(1, 31), 2.0))
    torch.testing.assert_close(ours, torch.cat([first, by_hand(pipe, "blue circle", {1: 0.5})], dim=1))


@pytest.mark.parametrize(
    "prompt, lengths",
    [
        ("red " * 31, [30, 1]),
        ("red " * 24 + ", " + "blue " * 6, [25, 6]),  # the five words behind the comma move
        ("red " * 10 + ", " + "blue " * 20, [11, 20]),  # 19 of them stood in the full chunk
        ("red " * 9 + ", " + "blue " * 21, [30, 1]),  # 20 are too many
        ("red " * 29 + ", blue", [30, 1]),
        ("red " * 30 + ", blue", [30, 2]),
        ("red " * 28 + ", red, blue", [30, 2]),  # a comma is itself no word to move
        ("red, " * 15, [30]),
        ("red " * 20 + ", " + "blue " * 9 + "BREAK circle", [30, 1]),  # it fits
    ],
)
def test_a_full_chunk_ends_behind_a_comma_that_is_near(pipe, prompt, lengths):
    found = chunks(prompt, pipe.tokenizer)
    assert [len(chunk.ids) for chunk in found] == lengths
    ids = pipe.tokenizer(prompt.replace("BREAK", ""), add_special_tokens=False).input_ids
    assert [token for chunk in found for token in chunk.ids] == ids


def test_clip_skip_counts_layers_from_the_last_for_both_prompts(pipe):
    for layer in (1, 2, 3):
        ours, negative = encoded(pipe, "a (red:1.2) circle", "blue", clip_skip=layer)
        torch.testing.assert_close(ours, by_hand(pipe, "a red circle", {2: 1.2}, layer))
        assert torch.equal(negative, by_hand(pipe, "blue", layer=layer))
    with pytest.raises(BadInput, match=r"clip_skip=4.*layers 1 \(the last\) to 3"):
        encoded(pipe, "a", clip_skip=4)


def test_the_pipelines_own_clip_skip_counts_on_from_there(pipe):
    with weighted_prompts(pipe):
        ours, _ = pipe.encode_prompt("a red circle", CPU, 1, False, clip_skip=1)
    assert torch.equal(ours, by_hand(pipe, "a red circle", layer=2))


@pytest.mark.parametrize("prompt", [None, "a (red:1.5) circle"])
def test_embeddings_that_are_given_pass(pipe, prompt):
    given = torch.randn(1, 32, 96)
    with weighted_prompts(pipe):
        ours, _ = pipe.encode_prompt(prompt, CPU, 1, False, prompt_embeds=given)
    assert torch.equal(ours, given)


def test_the_pipeline_is_as_it_was_afterwards_also_after_an_exception(pipe):
    before = dict(vars(pipe))
    with pytest.raises(KeyError), weighted_prompts(pipe):
        assert "encode_prompt" in vars(pipe)
        raise KeyError
    assert vars(pipe) == before


def test_every_pipeline_made_of_the_parts_draws_from_long_weighted_prompts(pipe):
    options = dict(num_inference_steps=2, output_type="latent")
    images = []
    for negative in ("blue", "[blue]"):
        with weighted_prompts(pipe):
            source = torch.Generator().manual_seed(0)
            images.append(pipe(LONG, negative_prompt=negative, width=64, height=64, generator=source, **options).images)
    assert images[0].isfinite().all() and not torch.equal(*images)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    with weighted_prompts(other):
        assert other(f"({LONG}:1.3)", image=torch.rand(1, 3, 64, 64), **options).images.isfinite().all()


def test_a_regions_prompt_has_weights_and_any_length_of_its_own(pipe):
    region = Region(x=0, y=0, w=0.5, h=1, prompt=f"(red:1.4) BREAK {LONG}")
    with weighted_prompts(pipe):
        texts = Texts(pipe.encode_prompt, (region,))
        positive, negative = texts.encode_prompt("on blue", CPU, 1, True)
        own = texts.of(region, {"encoder_hidden_states": torch.cat([negative, positive])})["encoder_hidden_states"]
    assert positive.shape == (1, 32, 96)
    assert own.shape[1] == 32 * len(chunks(f"on blue, {region.prompt}", pipe.tokenizer)) > 64
    torch.testing.assert_close(own[1:, :32], by_hand(pipe, "on blue, red", {4: 1.4}))
    assert torch.equal(own[:1, -32:], by_hand(pipe, ""))


def test_regions_draw_from_weighted_prompts_of_other_lengths_than_the_pictures(pipe):
    images = []
    for weight in (1, 1.4):
        regions = [
            Region(x=x, y=0, w=0.5, h=1, prompt=f"(red:{weight}){' BREAK blue' * n}") for n, x in enumerate((0, 0.5))
        ]
        with weighted_prompts(pipe), tiled_diffusion(pipe, tile_width=8, tile_height=8, regions=regions):
            source = torch.Generator().manual_seed(0)
            images.append(
                pipe("a", width=96, height=64, num_inference_steps=2, generator=source, output_type="latent").images
            )
    assert images[0].isfinite().all()
    changed = (images[0] != images[1]).any(dim=1)[0]
    assert changed.any(dim=0).all()


def sdxl_by_hand(pipe, text: str, weights: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    parts = []
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        ids = pipe.tokenizer(text, padding="max_length", max_length=32, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states = output.hidden_states[-2]
        emphasised = states.clone()
        for place, weight in weights.items():
            emphasised[0, place] *= weight
        parts.append(emphasised * states.mean() / emphasised.mean())
    return torch.cat(parts, dim=-1), output.text_embeds


def test_sdxl_weighs_the_states_of_both_encoders_and_pools_the_first_chunk(tiny_sdxl):
    with weighted_prompts(tiny_sdxl):
        given = dict(prompt="a (red:1.5) circle BREAK on blue", negative_prompt="[blue]", device=CPU)
        states, negative, pooled, negative_pooled = tiny_sdxl.encode_prompt(**given)
    first, expected_pooled = sdxl_by_hand(tiny_sdxl, "a red circle", {2: 1.5})
    second, _ = sdxl_by_hand(tiny_sdxl, "on blue", {})
    torch.testing.assert_close(states, torch.cat([first, second], dim=1))
    torch.testing.assert_close(pooled, expected_pooled)
    first, expected_pooled = sdxl_by_hand(tiny_sdxl, "blue", {1: 1 / 1.1})
    torch.testing.assert_close(negative, torch.cat([first, sdxl_by_hand(tiny_sdxl, "", {})[0]], dim=1))
    torch.testing.assert_close(negative_pooled, expected_pooled)


@pytest.mark.parametrize("skip", [1, 2])
def test_sdxl_without_weights_is_bit_equal_and_without_a_negative_prompt_it_has_zeros(tiny_sdxl, skip):
    given = dict(prompt=["a red circle", "on blue"], device=CPU, num_images_per_prompt=2)
    plain = tiny_sdxl.encode_prompt(**given, negative_prompt=["", "blue"])
    with weighted_prompts(tiny_sdxl, skip):
        ours = tiny_sdxl.encode_prompt(**given, negative_prompt=["", "blue"])
        long = tiny_sdxl.encode_prompt(**given | {"prompt": [LONG, "a"]})
    assert all(map(torch.equal, plain, ours))
    assert long[0].shape == long[1].shape and long[0].shape[1] > 32
    assert not long[1].any() and not long[3].any()


def test_sdxls_second_prompt_is_for_its_second_encoder(tiny_sdxl):
    with weighted_prompts(tiny_sdxl):
        states, _, pooled, _ = tiny_sdxl.encode_prompt("a (red:1.5) circle", "on (blue:1.5)", device=CPU)
    first, _ = sdxl_by_hand(tiny_sdxl, "a red circle", {2: 1.5})
    second, expected_pooled = sdxl_by_hand(tiny_sdxl, "on blue", {2: 1.5})
    torch.testing.assert_close(states, torch.cat([first[..., :32], second[..., 32:]], dim=-1))
    torch.testing.assert_close(pooled, expected_pooled)


def test_sdxl_draws_from_a_long_weighted_prompt(tiny_sdxl):
    with weighted_prompts(tiny_sdxl):
        image = tiny_sdxl(
            f"({LONG}:1.2)", negative_prompt="", width=64, height=64, num_inference_steps=1, output_type="latent"
        )
    assert image.images.isfinite().all()
