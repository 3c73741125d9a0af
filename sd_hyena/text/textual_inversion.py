"""Textual inversions: words learnt as vectors, from files of A1111 and diffusers into a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_hyena.errors import BadInput
from sd_hyena.files.weights import read_pickle, read_weights
from sd_hyena.files.weights_kind import PICKLED
from sd_hyena.models.condition import text_encoders
from sd_hyena.models.lora.lora_file import LoraFile
from sd_hyena.options import given_path

SDXL = ("clip_l", "clip_g")  # keys of a file for both of its text encoders


@dataclass(frozen=True)
class Embedding:
    """The vectors (n, D) behind a word, for each text encoder. `asked` if its file was named, not only its folder.

    `name` is its own, where a file holds something else too.
    """

    path: Path
    vectors: tuple[Tensor, ...]
    asked: bool
    name: str = ""

    @property
    def word(self) -> str:
        """How a prompt calls it: by its file's name, as in A1111."""
        return self.name or self.path.stem

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(tensor.shape[1] for tensor in self.vectors)


def read_embeddings(entries: str) -> list[Embedding]:
    """The embeddings of files and folders, separated by commas; folders with all below. Raises BadInput."""
    found: dict[str, Embedding] = {}
    for path, asked in given_path.embeddings(entries):
        embedding = Embedding(path, _vectors(path), asked)
        word = embedding.word.lower()  # tokenizers of CLIP are blind to case
        if word in found:
            raise BadInput(f"embeddings: {str(path)!r} and {str(found[word].path)!r} have one name; rename one of them")
        found[word] = embedding
    return list(found.values())


def with_bundled(embeddings: Sequence[Embedding], loras: Iterable[LoraFile]) -> tuple[Embedding, ...]:
    """And those that LoRA files bring with them, but for words that are taken."""
    found = {embedding.word.lower(): embedding for embedding in embeddings}
    for lora in loras:
        for word, vectors in lora.embeddings.items():
            found.setdefault(word.lower(), Embedding(lora.path, vectors, True, word))
    return tuple(found.values())


@contextmanager
def embedded(pipe: Any, embeddings: Sequence[Embedding]) -> Iterator[None]:
    """Within the block, `pipe` knows these words; afterwards it has its own tokenizers and vectors again. Raises BadInput."""
    names = ("tokenizer", "tokenizer_2")[: len(text_encoders(pipe))]
    before = [
        (name, getattr(pipe, name), encoder) for name, (_, encoder) in zip(names, text_encoders(pipe), strict=True)
    ]
    tables = [(encoder.get_input_embeddings(), _ends(encoder)) for _, _, encoder in before]
    try:
        if embeddings:
            for name, tokenizer, _ in before:
                setattr(pipe, name, copy.deepcopy(tokenizer))
            load_embeddings(pipe, embeddings)
        yield
    finally:
        for (name, tokenizer, encoder), (table, ends) in zip(before, tables, strict=True):
            setattr(pipe, name, tokenizer)
            encoder.set_input_embeddings(table)
            encoder.config.vocab_size = table.num_embeddings
            for module, end in ends:
                module.eos_token_id = end


def _ends(encoder: Any) -> list[tuple[Any, int]]:
    """Each module that knows which token ends a text, and which one."""
    return [(module, module.eos_token_id) for module in encoder.modules() if hasattr(module, "eos_token_id")]


def load_embeddings(pipe: Any, embeddings: Sequence[Embedding]) -> None:
    """Teach the pipeline's tokenizers and text encoders these words. Those of a folder that fit other models are left out.

    Raises BadInput for a file asked for by name that does not fit.
    """
    encoders = text_encoders(pipe)
    widths = tuple(encoder.get_input_embeddings().embedding_dim for _, encoder in encoders)
    fitting = [embedding for embedding in embeddings if embedding.widths == widths]
    for embedding in embeddings:
        if embedding.widths != widths and embedding.asked:
            raise BadInput(
                f"embeddings={str(embedding.path)!r} is for text encoders of width {_listed(embedding.widths)}, "
                f"the model's have {_listed(widths)}"
            )
    if left := len(embeddings) - len(fitting):
        print(f"note: {left} embeddings are for other models and are left out")
    if not fitting:
        return
    words = [embedding.word for embedding in fitting]
    for n, (tokenizer, encoder) in enumerate(encoders):
        try:
            with torch.random.fork_rng():  # rows are drawn at random before they are filled
                vectors = [embedding.vectors[n] for embedding in fitting]
                pipe.load_textual_inversion(vectors, token=words, tokenizer=tokenizer, text_encoder=encoder)
        except ValueError as error:
            raise BadInput(f"embeddings: {str(error).splitlines()[0][:200]}") from None
        for module, _ in _ends(encoder):  # SDXL's says 2, which takes the largest token for the end: now that is a word
            module.eos_token_id = tokenizer.eos_token_id


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def _vectors(path: Path) -> tuple[Tensor, ...]:
    content = read_pickle(path) if path.suffix.lower() in PICKLED else read_weights(path)[0]
    if isinstance(content, dict) and "string_to_param" in content:  # A1111's
        content = content["string_to_param"]
    values = list(content.values()) if isinstance(content, dict) else [content]
    if isinstance(content, dict) and set(content) == set(SDXL):
        values = [content[key] for key in SDXL]
    elif len(values) != 1:
        raise BadInput(f"embeddings={str(path)!r} holds {len(values)} entries; one word's vectors are expected")
    return tuple(_matrix(value, path) for value in values)


def _matrix(value: Any, path: Path) -> Tensor:
    tensor = torch.atleast_2d(value.detach()) if isinstance(value, Tensor) else torch.empty(0)
    if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point() or not tensor.isfinite().all():
        raise BadInput(f"embeddings={str(path)!r} holds no vectors of finite numbers")
    return tensor
