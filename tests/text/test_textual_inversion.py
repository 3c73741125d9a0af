import os

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import save_file

from sd_hyena.errors import BadInput
from sd_hyena.models.pipeline import load_pipeline
from sd_hyena.text.encoding import chunks, weighted_prompts
from sd_hyena.text.textual_inversion import load_embeddings, read_embeddings

CPU = torch.device("cpu")


@pytest.fixture
def vectors():
    return torch.randn(3, 96, generator=torch.Generator().manual_seed(0))


def a1111(path, vectors):
    """A file as A1111's training writes it."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(vectors)}, "name": "inner"}
    torch.save(content | {"step": 500, "sd_checkpoint": None, "sd_checkpoint_name": None}, path)
    return str(path)


@torch.no_grad()
def states(pipe, prompt):
    with weighted_prompts(pipe):
        return pipe.encode_prompt(prompt, CPU, 1, False)[0]


@torch.no_grad()
def by_hand(pipe, ids, inserted):
    """The states of a chunk whose token embeddings at some places are the given vectors."""
    encoder = pipe.text_encoder
    tokens = [pipe.tokenizer.bos_token_id, *ids, pipe.tokenizer.eos_token_id]
    tokens += [pipe.tokenizer.pad_token_id] * (32 - len(tokens))
    hook = encoder.get_input_embeddings().register_forward_hook(
        lambda _module, _args, output: torch.cat(
            [inserted[i][None, None] if i in inserted else output[:, i : i + 1] for i in range(32)], dim=1
        )
    )
    try:
        return encoder(torch.tensor([tokens])).last_hidden_state
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "kind", ["a1111 .pt", "a1111 .safetensors", "diffusers .bin", "a tensor alone", "half precision"]
)
def test_a_words_vectors_are_read_where_the_word_stands(tmp_path, own_pipe, vectors, kind):
    path = tmp_path / "MyStyle.pt"
    if kind == "a1111 .pt":
        a1111(path, vectors)
    elif kind == "a1111 .safetensors":
        save_file({"emb_params": vectors}, path := path.with_suffix(".safetensors"))
    elif kind == "diffusers .bin":
        torch.save({"<other>": vectors}, path := path.with_suffix(".bin"))
    elif kind == "a tensor alone":
        torch.save(vectors, path)
    else:
        vectors = vectors.half()
        a1111(path, vectors)
    red, blue = own_pipe.tokenizer("red blue", add_special_tokens=False).input_ids
    state = torch.get_rng_state()
    load_embeddings(own_pipe, read_embeddings(str(path)))
    assert torch.equal(torch.get_rng_state(), state)
    expected = by_hand(own_pipe, [red, 0, 0, 0, blue], {2 + i: vector.float() for i, vector in enumerate(vectors)})
    for spelling in ("red MyStyle blue", "red mystyle blue", "red (MYSTYLE:1) blue"):
        torch.testing.assert_close(states(own_pipe, spelling), expected)
    plain = own_pipe.encode_prompt("red blue", CPU, 1, False)[0]
    assert torch.equal(states(own_pipe, "red blue"), plain)


def test_the_vectors_of_a_word_are_weighted_together_and_never_torn_apart(tmp_path, own_pipe, vectors):
    load_embeddings(own_pipe, read_embeddings(a1111(tmp_path / "style.pt", vectors)))
    (chunk,) = chunks("a (style:1.3)", own_pipe.tokenizer)
    assert len(chunk.ids) == 4 and chunk.weights == (1.0, 1.3, 1.3, 1.3)
    found = chunks("red " * 28 + "style blue", own_pipe.tokenizer)
    assert [len(chunk.ids) for chunk in found] == [28, 4]
    found = chunks(
        "red " * 25 + ", red red style blue", own_pipe.tokenizer
    )  # not full yet, so not wrapped at the comma
    assert [len(chunk.ids) for chunk in found] == [28, 4]
    found = chunks("red " * 26 + ", red red red style blue", own_pipe.tokenizer)
    assert [len(chunk.ids) for chunk in found] == [27, 7]


def test_a_word_of_more_vectors_than_a_chunk_holds_is_continued_in_the_next(tmp_path, own_pipe):
    load_embeddings(own_pipe, read_embeddings(a1111(tmp_path / "novel.pt", torch.randn(70, 96))))
    assert [len(chunk.ids) for chunk in chunks("a novel", own_pipe.tokenizer)] == [1, 30, 30, 10]


def test_a_single_vector_is_a_word_of_the_pipelines_own(tmp_path, own_pipe, vectors):
    load_embeddings(own_pipe, read_embeddings(a1111(tmp_path / "style.pt", vectors[0])))
    (a,) = own_pipe.tokenizer("a", add_special_tokens=False).input_ids
    assert torch.equal(states(own_pipe, "a style"), by_hand(own_pipe, [a, 0], {2: vectors[0]}))


def test_of_a_folder_what_fits_is_loaded_and_the_rest_counted(tmp_path, own_pipe, vectors, capsys):
    (tmp_path / "deep").mkdir()
    a1111(tmp_path / "one.pt", vectors)
    a1111(tmp_path / "wide.pt", torch.randn(2, 768))
    save_file({"clip_l": torch.randn(1, 96), "clip_g": torch.randn(1, 96)}, tmp_path / "both.safetensors")
    save_file({"emb_params": vectors[:1]}, tmp_path / "deep" / "Two.safetensors")
    (tmp_path / "readme.txt").write_text("no embedding")
    load_embeddings(own_pipe, read_embeddings(str(tmp_path)))
    assert capsys.readouterr().out == "note: 2 embeddings are for other models and are left out: both, wide\n"
    assert [len(chunk.ids) for chunk in chunks("one two BREAK one BREAK TWO", own_pipe.tokenizer)] == [4, 3, 1]
    with pytest.raises(BadInput, match=r"wide\.pt.*width 768.*have 96"):
        load_embeddings(own_pipe, read_embeddings(f"{tmp_path / 'wide.pt'}"))


def test_both_encoders_of_sdxl_learn_the_word_and_the_pooled_text_stays_at_the_end(tmp_path, tiny_sdxl):
    scheduler, tiny_sdxl.scheduler = tiny_sdxl.scheduler, EulerDiscreteScheduler()
    tiny_sdxl.save_pretrained(tmp_path / "model")
    tiny_sdxl.scheduler = scheduler
    pipe = load_pipeline(tmp_path / "model", CPU, torch.float32)
    pipe.text_encoder_2.text_model.eos_token_id = 2  # as SDXL's own config says
    left, right = torch.randn(2, 32), torch.randn(2, 48)
    save_file({"clip_g": right, "clip_l": left}, tmp_path / "style.safetensors")
    with torch.no_grad():
        before = pipe.encode_prompt("a red circle", device=CPU)
    load_embeddings(pipe, read_embeddings(str(tmp_path / "style.safetensors")))
    for tokenizer, encoder, expected in (
        (pipe.tokenizer, pipe.text_encoder, left),
        (pipe.tokenizer_2, pipe.text_encoder_2, right),
    ):
        (chunk,) = chunks("style", tokenizer)
        assert torch.equal(encoder.get_input_embeddings().weight[list(chunk.ids)], expected)
    with torch.no_grad(), weighted_prompts(pipe):
        after = pipe.encode_prompt("a red circle", device=CPU)
        one, other = (pipe.encode_prompt(f"style {word}", device=CPU)[2] for word in ("red", "blue"))
    assert all(map(torch.equal, before, after))
    assert not torch.equal(one, other)  # at the word itself, which sees only what stands before it, they would be equal


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    "content, reason",
    [
        (Payload(), "not executed"),
        ({"a": torch.ones(1, 96), "b": torch.ones(1, 96)}, "2 entries"),
        ({}, "0 entries"),
        ({"string_to_param": {}}, "0 entries"),
        ({"string_to_param": {"*": "text"}}, "no vectors"),
        ("text", "no vectors"),
        (torch.ones(2, 3, 96), "no vectors"),
        (torch.ones(0, 96), "no vectors"),
        (torch.ones(2, 96, dtype=torch.long), "no vectors"),
        (torch.full((2, 96), float("nan")), "no vectors"),
    ],
)
def test_files_that_hold_no_word_are_refused_in_one_line(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=rf"x\.pt.*{reason}") as error:
        read_embeddings("x.pt")
    assert "\n" not in str(error.value) and not (tmp_path / "executed").exists()


def test_missing_damaged_and_misnamed_files_are_refused(tmp_path, own_pipe, vectors):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "x.jpg").write_text("hello")
    for name in ("text.pt", "text.safetensors", "x.jpg", "missing.pt"):
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            read_embeddings(str(tmp_path / name))
    a1111(tmp_path / "Twice.pt", vectors)
    save_file({"emb_params": vectors}, tmp_path / "twice.safetensors")
    with pytest.raises(BadInput, match="have one name"):
        read_embeddings(f"{tmp_path / 'Twice.pt'}, {tmp_path / 'twice.safetensors'}")


def test_no_embeddings_are_no_embeddings(own_pipe):
    before = own_pipe.text_encoder.get_input_embeddings()
    load_embeddings(own_pipe, read_embeddings(" , "))
    assert own_pipe.text_encoder.get_input_embeddings() is before
