"""Words of embeddings are not text, and text is not their words."""

import pytest
import torch
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.models.clip_vocabulary import clip_tokenizer
from sd_hyena.text.encoding import chunks
from sd_hyena.text.textual_inversion import load_embeddings, read_embeddings
from sd_hyena.text.words import Words, teach


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer("<|endoftext|>")


def taught(tokenizer, *words, unusable=None):
    teach(tokenizer, Words({word: (100_000 + i,) for i, word in enumerate(words)}, unusable))
    return tokenizer


def read(tokenizer, prompt):
    """The prompt's tokens, for each embedding its number."""
    ids = [token for chunk in chunks(prompt, tokenizer) for token in chunk.ids]
    return [token - 100_000 if token >= 100_000 else tokenizer.decode([token]).strip() for token in ids]


@pytest.mark.parametrize(
    "prompt", ["a bored dog", "handsome", "redder, infrared", "red_dog", "ahands", "catalogue", "naïvered", "red2 2red"]
)
def test_a_word_is_not_found_inside_another(tokenizer, prompt):
    plain = [chunk.ids for chunk in chunks(prompt, taught(tokenizer))]
    assert [chunk.ids for chunk in chunks(prompt, taught(tokenizer, "red", "hands", "cat", "naïve"))] == plain


@pytest.mark.parametrize(
    "prompt", ["red dog", "RED dog", "(red:1) dog", "[[((red))]] dog", "embedding:red dog", "Embedding:Red.PT dog"]
)
def test_a_word_is_found_whatever_stands_around_it(tokenizer, prompt):
    assert read(taught(tokenizer, "Red"), prompt) == [0, "dog"]


@pytest.mark.parametrize("prompt", ["red, dog", "red.dog", "red-dog", "red\ndog", "red's dog", "red/dog", "red!dog"])
def test_punctuation_is_a_border(tokenizer, prompt):
    found = read(taught(tokenizer, "red"), prompt)
    assert found[0] == 0 and found[-1] == "dog"


@pytest.mark.parametrize("word", ["art", "anime", "style", "cat", "bad", "a", "1girl", "!", "</w>", "<|endoftext|>"])
def test_pieces_of_clips_vocabulary_are_words_too(tokenizer, word):
    assert read(taught(tokenizer, word), f"an old {word} of old") == ["an", "old", 0, "of", "old"]


@pytest.mark.parametrize(
    "word, prompt",
    [
        ("my(1)", r"old my\(1\) old"),
        ("my(1)", "old my(1) old"),
        ("my(1)", "old (my(1):1.0) old"),
        ("[x]", "old [x] old"),
        ("<style>", "old <style> old"),
        ("by x, the y", "old By  X,\nthe y old"),
        ("a:2", "old a:2 old"),
        ("v1.5-neg", "old v1.5-NEG old"),
        ("e\u0301lan", "old \u00e9lan old"),  # as a Mac writes names of files
        ("\u00e9lan", "old e\u0301lan old"),
        ("a+b*c?", "old a+b*c? old"),
        ("漫画", "old 漫画 old"),
        ("_x_", "old _x_ old"),
        (r"a\b", r"old a\b old"),
    ],
)
def test_names_are_found_whatever_is_in_them(tokenizer, word, prompt):
    assert read(taught(tokenizer, word), prompt) == ["old", 0, "old"]


def test_of_words_that_hold_each_other_the_longest_is_found(tokenizer):
    found = read(taught(tokenizer, "style", "my style", "my style 2", "style-2"), "my style 2, my style, style-2 style")
    assert [token for token in found if isinstance(token, int)] == [2, 1, 3, 0]


def test_weights_and_chunks_see_a_word_as_any_other(tokenizer):
    (chunk,) = chunks("old (red:1.3) [blue] old", taught(tokenizer, "red", "blue"))
    assert chunk.weights == pytest.approx((1.0, 1.3, 1 / 1.1, 1.0))
    first, second = chunks("red BREAK blue", tokenizer)
    assert first.ids == (100_000,) and second.ids == (100_001,)


def test_an_unusable_word_is_refused_only_to_the_prompt_that_has_it(tokenizer):
    taught(tokenizer, "red", unusable={"Odd": "odd.pt is damaged"})
    assert read(tokenizer, "red oddity")[0] == 0
    with pytest.raises(BadInput, match=r"'ODD' in the prompt: odd\.pt is damaged"):
        chunks("red, ODD", tokenizer)
    teach(tokenizer, Words({}))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "words" / "sdxl").mkdir(parents=True)
    save_file({"emb_params": torch.ones(2, 96)}, tmp_path / "words" / "cat.safetensors")
    return tmp_path / "words"


def ids_of(pipe, prompt):
    return [token for chunk in chunks(prompt, pipe.tokenizer) for token in chunk.ids]


def test_one_name_for_two_models_is_the_one_that_fits(folder, own_pipe):
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, folder / "sdxl" / "cat.safetensors")
    load_embeddings(own_pipe, read_embeddings(str(folder)))
    assert len(ids_of(own_pipe, "cat")) == 2


def test_two_that_fit_are_refused_only_to_the_prompt_that_asks_and_a_file_named_itself_comes_first(folder, own_pipe):
    save_file({"emb_params": torch.zeros(3, 96)}, folder / "sdxl" / "CAT.safetensors")
    load_embeddings(own_pipe, read_embeddings(str(folder)))
    assert ids_of(own_pipe, "a dog")
    with pytest.raises(BadInput, match=r"have one name; rename one of them"):
        ids_of(own_pipe, "a Cat")
    load_embeddings(own_pipe, read_embeddings(f"{folder},{folder}/sdxl/CAT.safetensors"))
    assert len(ids_of(own_pipe, "cat")) == 3
    load_embeddings(own_pipe, read_embeddings(f"{folder}/cat.safetensors,{folder}/cat.safetensors"))
    assert len(ids_of(own_pipe, "cat")) == 2


def test_words_taught_again_replace_the_earlier_and_none_leave_the_model_as_it_was(folder, own_pipe):
    encoder = own_pipe.text_encoder
    before = encoder.get_input_embeddings().weight.clone()
    for _ in range(2):
        load_embeddings(own_pipe, read_embeddings(str(folder)))
        assert encoder.get_input_embeddings().weight.shape == (len(before) + 2, 96)
    load_embeddings(own_pipe, ())
    assert torch.equal(encoder.get_input_embeddings().weight, before)
    assert max(ids_of(own_pipe, "cat")) < len(before)


def test_a_word_in_the_prompt_changes_the_picture_and_a_word_that_holds_it_does_not(folder, tmp_path, loaded_once):
    import numpy as np
    from PIL import Image

    from sd_hyena.generate.generation import generate
    from sd_hyena.options.generate_config import GenerateConfig

    def drawn(prompt, embeddings):
        options = dict(width=64, steps=1, num_images=1, seed=1, device="cpu", out_dir=str(tmp_path / "out"))
        (path,) = generate(GenerateConfig(prompt=prompt, embeddings=embeddings, **options))
        return np.array(Image.open(path))

    save_file({"emb_params": torch.randn(1, 96)}, folder / "red.safetensors")
    assert np.array_equal(drawn("a bored circle", str(folder)), drawn("a bored circle", ""))
    assert not np.array_equal(drawn("a red circle", str(folder)), drawn("a red circle", ""))
