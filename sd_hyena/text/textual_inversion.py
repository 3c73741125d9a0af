"""Textual inversions: words learnt as vectors, from files of A1111, diffusers and others into a pipeline."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.files.container import is_pickled
from sd_hyena.files.quantised import widened
from sd_hyena.files.weights import read_pickle, read_weights
from sd_hyena.files.weights_kind import INVERSION, NOTHING_KNOWN, kind_of
from sd_hyena.models.condition import text_encoders
from sd_hyena.models.lora.lora_file import LoraFile
from sd_hyena.options import given_path
from sd_hyena.processes.ranks import say
from sd_hyena.text.words import Words, key_of, teach, words_of

ASKED = re.compile(r"(?<!\w)embedding:([^\s,;:()\[\]]+)", re.IGNORECASE)
SDXL = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))  # keys of a file for both of its text encoders


@dataclass(frozen=True)
class Embedding:
    """The vectors (n, D) behind a word, for each text encoder, or the `fault` for which there are none.

    `asked` if its file was named, not only its folder. `name` is its own, where a file holds something else too.
    """

    path: Path
    vectors: tuple[Tensor, ...]
    asked: bool
    fault: str = ""
    name: str = ""

    @property
    def word(self) -> str:
        """How a prompt calls it: by its file's name, as in A1111."""
        return self.name or self.path.stem

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(tensor.shape[1] for tensor in self.vectors)


def read_embeddings(entries: str) -> list[Embedding]:
    """The embeddings of files and folders, separated by commas; folders with all below.

    Raises BadInput for a file that was named; what is odd in a folder is only refused to the prompt that asks for it.
    """
    found: list[Embedding] = []
    for path, asked in given_path.embeddings(entries):
        try:
            found.append(Embedding(path, _vectors(path), asked))
        except BadInput as error:
            if asked:
                raise
            found.append(Embedding(path, (), asked, str(error)))
    _check_names([embedding for embedding in found if embedding.asked])
    return found


def _check_names(embeddings: Sequence[Embedding]) -> None:
    seen: dict[str, Embedding] = {}
    for embedding in embeddings:
        other = seen.setdefault(key_of(embedding.word), embedding)
        if other.path != embedding.path:
            raise BadInput(_one_name(embedding, other))


def _one_name(one: Embedding, other: Embedding) -> str:
    return f"embeddings: {str(one.path)!r} and {str(other.path)!r} have one name; rename one of them"


def with_bundled(embeddings: Sequence[Embedding], loras: Iterable[LoraFile]) -> tuple[Embedding, ...]:
    """And those that LoRA files bring with them, but for words that are taken."""
    taken = {key_of(embedding.word) for embedding in embeddings}
    bundled = {
        key_of(word): Embedding(lora.path, vectors, True, name=word)
        for lora in loras
        for word, vectors in lora.embeddings.items()
    }
    return *embeddings, *(embedding for word, embedding in bundled.items() if word not in taken)


def check_asked(texts: Iterable[str], embeddings: Sequence[Embedding]) -> None:
    """Raise BadInput for an `embedding:NAME` in a prompt that is none of these, and would be drawn as text."""
    words = Words({embedding.word: () for embedding in embeddings})
    for piece in (piece for text in texts for piece in words.found(text)):
        if isinstance(piece, str) and (asked := ASKED.search(piece)):
            raise BadInput(
                f"prompt: there is no embedding {asked[1]!r}; give its file with --embeddings, or take {asked[0]!r} out"
            )


@contextmanager
def embedded(pipe: Any, embeddings: Sequence[Embedding]) -> Iterator[None]:
    """Within the block, `pipe` knows these words; afterwards it knows what it knew. Raises BadInput."""
    encoders = text_encoders(pipe)
    before = [(words_of(tokenizer), encoder.get_input_embeddings(), _ends(encoder)) for tokenizer, encoder in encoders]
    try:
        if embeddings:
            load_embeddings(pipe, embeddings)
        yield
    finally:
        for (tokenizer, encoder), (words, table, ends) in zip(encoders, before, strict=True):
            teach(tokenizer, words)
            encoder.set_input_embeddings(table)
            for module, end in ends:
                module.eos_token_id = end


def _ends(encoder: nn.Module) -> list[tuple[Any, int]]:
    """Each module that knows which token ends a text, and which one."""
    return [(module, module.eos_token_id) for module in encoder.modules() if hasattr(module, "eos_token_id")]


def load_embeddings(pipe: Any, embeddings: Sequence[Embedding]) -> None:
    """Teach the pipeline these words, and no others. Those of a folder that are for other models are left out.

    Raises BadInput for a file asked for by name that does not fit.
    """
    encoders = text_encoders(pipe)
    widths = tuple(encoder.get_input_embeddings().embedding_dim for _, encoder in encoders)
    others = [embedding for embedding in embeddings if not embedding.fault and embedding.widths != widths]
    for embedding in others:
        if embedding.asked:
            raise BadInput(
                f"embeddings={str(embedding.path)!r} is for text encoders of width {_listed(embedding.widths)}, "
                f"the model's have {_listed(widths)}"
            )
    if others:
        names = ", ".join(sorted(embedding.word for embedding in others))
        say(f"note: {len(others)} embeddings are for other models and are left out: {names[:200]}")
    if faults := [embedding for embedding in embeddings if embedding.fault]:
        say(f"note: {len(faults)} files among the embeddings are left out: {faults[0].fault}")
    usable, unusable = _told_apart([embedding for embedding in embeddings if embedding.widths == widths])
    unusable = {
        embedding.word: embedding.fault for embedding in faults if key_of(embedding.word) not in usable
    } | unusable
    for n, (tokenizer, encoder) in enumerate(encoders):
        rows = _add_rows(encoder, [embedding.vectors[n] for embedding in usable.values()])
        teach(tokenizer, Words(dict(zip(usable, rows, strict=True)), unusable))
        for module, _ in _ends(encoder) if usable else ():  # SDXL's says 2, for the largest token: now that is a word
            module.eos_token_id = tokenizer.eos_token_id


def _told_apart(embeddings: Sequence[Embedding]) -> tuple[dict[str, Embedding], dict[str, str]]:
    """The embeddings by word, and why there is none for a word that is the name of several in folders."""
    named = {key_of(embedding.word): embedding for embedding in embeddings if embedding.asked}
    found: dict[str, dict[Path, Embedding]] = {}
    for embedding in embeddings:
        found.setdefault(key_of(embedding.word), {})[embedding.path] = embedding
    several = {word: list(ones.values()) for word, ones in found.items() if len(ones) > 1 and word not in named}
    usable = {word: named.get(word, next(iter(ones.values()))) for word, ones in found.items() if word not in several}
    return usable, {word: _one_name(*ones[:2]) for word, ones in several.items()}


@torch.no_grad()
def _add_rows(encoder: nn.Module, words: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Put the words' vectors behind the encoder's own, in place of earlier ones; their numbers."""
    table = encoder.get_input_embeddings()
    own = table.weight[: getattr(table, "own_rows", len(table.weight))]
    if len(own) + sum(map(len, words)) != len(table.weight) or words:
        grown = nn.Embedding.from_pretrained(torch.cat([own, *(vectors.to(own) for vectors in words)]))
        grown.own_rows = len(own)
        encoder.set_input_embeddings(grown)
    numbers, start = [], len(own)
    for vectors in words:
        numbers.append(tuple(range(start, start := start + len(vectors))))
    return numbers


def _listed(widths: Sequence[int]) -> str:
    return " and ".join(map(str, widths))


def _vectors(path: Path) -> tuple[Tensor, ...]:
    content = read_pickle(path) if is_pickled(path) else read_weights(path)[0]
    if isinstance(content, dict) and "string_to_param" in content:  # A1111's, the original code's
        content = content["string_to_param"]
    values = list(content.values()) if isinstance(content, dict) else [content]
    for both in SDXL:
        if isinstance(content, dict) and set(content) == set(both):
            return tuple(_matrix(content[key], path) for key in both)
    if len(values) != 1:
        kind = kind_of(str(name) for name in content)
        looks = "" if kind in (INVERSION, NOTHING_KNOWN) else f" and looks like {kind}"
        raise BadInput(f"embeddings={str(path)!r} holds {len(values)} entries{looks}; one word's vectors are expected")
    return (_matrix(values[0], path),)


def _matrix(value: Any, path: Path) -> Tensor:
    tensor = widened(torch.atleast_2d(value.detach())) if isinstance(value, Tensor) else torch.empty(0)
    if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point() or not tensor.isfinite().all():
        raise BadInput(f"embeddings={str(path)!r} holds no vectors of finite numbers")
    return tensor
