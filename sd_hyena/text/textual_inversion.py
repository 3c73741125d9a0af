"""Textual inversions: words learnt as vectors, from files of A1111, diffusers and others into a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
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
from sd_hyena.models.pipeline import text_encoders
from sd_hyena.options import given_path
from sd_hyena.processes.ranks import say
from sd_hyena.text.words import Words, key_of, teach

SDXL = (("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"))  # keys of a file for both of its text encoders


@dataclass(frozen=True)
class Embedding:
    """The vectors (n, D) behind a word, for each text encoder, or the `fault` for which there are none.

    `asked` if its file was named, not only its folder.
    """

    path: Path
    vectors: tuple[Tensor, ...]
    asked: bool
    fault: str = ""

    @property
    def word(self) -> str:
        """How a prompt calls it: by its file's name, as in A1111."""
        return self.path.stem

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


def load_embeddings(pipe: Any, embeddings: Sequence[Embedding]) -> None:
    """Teach the pipeline these words, and no others. Those of a folder that are for other models are left out.

    Raises BadInput for a file asked for by name that does not fit.
    """
    encoders = text_encoders(pipe)
    widths = tuple(encoder.get_input_embeddings().embedding_dim for _, encoder in encoders)
    fitting: dict[str, dict[Path, Embedding]] = {}
    others = [embedding for embedding in embeddings if not embedding.fault and embedding.widths != widths]
    for embedding in others:
        if embedding.asked:
            raise BadInput(
                f"embeddings={str(embedding.path)!r} is for text encoders of width {_listed(embedding.widths)}, "
                f"the model's have {_listed(widths)}"
            )
    for embedding in sorted(embeddings, key=lambda one: one.asked):
        if embedding.widths == widths:
            word = key_of(embedding.word)
            fitting[word] = (
                fitting.get(word, {}) | {embedding.path: embedding}
                if not embedding.asked
                else {embedding.path: embedding}
            )
    usable = [next(iter(found.values())) for found in fitting.values() if len(found) == 1]
    unusable = {
        embedding.word: embedding.fault
        for embedding in embeddings
        if embedding.fault and key_of(embedding.word) not in fitting
    }
    unusable |= {word: _one_name(*list(found.values())[:2]) for word, found in fitting.items() if len(found) > 1}
    if others:
        names = ", ".join(sorted(embedding.word for embedding in others))
        say(f"note: {len(others)} embeddings are for other models and are left out: {names[:200]}")
    if faults := [embedding for embedding in embeddings if embedding.fault]:
        say(f"note: {len(faults)} files among the embeddings are left out: {faults[0].fault}")
    for n, (tokenizer, encoder) in enumerate(encoders):
        rows = _add_rows(encoder, [embedding.vectors[n] for embedding in usable])
        teach(tokenizer, Words(dict(zip((e.word for e in usable), rows, strict=True)), unusable))
        for module in encoder.modules():  # SDXL's says 2, which takes the largest token for the end: now that is a word
            if usable and hasattr(module, "eos_token_id"):
                module.eos_token_id = tokenizer.eos_token_id


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
