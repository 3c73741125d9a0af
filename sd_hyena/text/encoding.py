"""Prompts of any length and with weights as text embeddings, wherever a pipeline encodes its prompt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sd_hyena.errors import BadInput
from sd_hyena.large.around import replaced
from sd_hyena.models.condition import text_encoders
from sd_hyena.options.prompt_constructs import constructs
from sd_hyena.text.prompt import parse
from sd_hyena.text.words import words_of

WRAP = 20  # tokens: what stands behind the last comma moves to the next chunk if it is no longer (A1111's default)


class Chunk(NamedTuple):
    """Tokens that the text encoder reads at once, without its own two, and their weights."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]


@contextmanager
def weighted_prompts(pipe: Any, clip_skip: int = 1) -> Iterator[None]:
    """Within the block, `pipe` (Stable Diffusion 1.x, 2.x, SDXL) reads prompts as `prompt.parse` has them, of any length.

    `clip_skip` is the layer of the text encoder that is read, from the last: 1 is the last, as A1111 counts. SDXL reads
    the second by itself, 1 leaves it there. Raises BadInput for more than there are. A prompt without weights that fits
    into one chunk is encoded by the pipeline itself, bit for bit.
    """
    encoding = PromptEncoding(pipe, clip_skip)
    ours = functools.update_wrapper(functools.partial(encoding.encode_prompt), pipe.encode_prompt)
    with replaced(pipe, "encode_prompt", ours):
        yield


def chunks(prompt: str, tokenizer: Any) -> list[Chunk]:
    """The prompt's tokens in chunks of what the tokenizer gives the encoder (75 of CLIP's 77), at least one.

    As in A1111: BREAK ends a chunk; one that is full ends behind its last comma if that is near; a textual inversion of
    several vectors is kept together.
    """
    room, comma = tokenizer.model_max_length - 2, tokenizer.convert_tokens_to_ids(",</w>")
    found: list[Chunk] = []
    for passage in parse(words_of(tokenizer).escaped(prompt)):
        tokens: list[tuple[int, float]] = []  # of the open chunk
        for text, weight in passage:
            for unit in _units(text, tokenizer, room):
                while tokens and len(tokens) + len(unit) > room:
                    end = _end(tokens, comma) if len(tokens) == room and unit != [comma] else len(tokens)
                    found.append(_chunk(tokens[:end]))
                    tokens = tokens[end:]
                tokens += [(token, weight) for token in unit]
        found.append(_chunk(tokens))
    return found if found[-1].ids or len(found) == 1 else found[:-1]


def _units(text: str, tokenizer: Any, room: int) -> Iterator[list[int]]:
    """Token by token; the vectors of a textual inversion together, as far as they can."""
    for piece in words_of(tokenizer).found(text):
        if isinstance(piece, tuple):
            yield from (list(piece[start : start + room]) for start in range(0, len(piece), room))
        else:
            yield from ([token] for token in tokenizer(piece, add_special_tokens=False).input_ids)


def _end(tokens: list[tuple[int, float]], comma: int) -> int:
    """Where a full chunk ends: behind its last comma if that is near."""
    behind = next((n for n, (token, _) in enumerate(reversed(tokens)) if token == comma), WRAP)
    return len(tokens) - behind if behind < WRAP else len(tokens)


def _chunk(tokens: list[tuple[int, float]]) -> Chunk:
    return Chunk(tuple(token for token, _ in tokens), tuple(weight for _, weight in tokens))


def weighted(states: Tensor, weights: Tensor) -> Tensor:
    """States (1, T, D) times weights (T,), with the mean that they had: A1111's emphasis."""
    before = states.float()
    after = before * weights[:, None]
    scale = before.mean() / after.mean()
    return (after * scale if scale.isfinite() else after).to(states.dtype)


class PromptEncoding:
    """What stands in for a pipeline's `encode_prompt`. Raises BadInput if there are not so many layers to skip."""

    def __init__(self, pipe: Any, clip_skip: int = 1):
        self._encode, self._signature = pipe.encode_prompt, inspect.signature(pipe.encode_prompt)
        self._encoders = text_encoders(pipe)
        for _, encoder in self._encoders:
            layers = encoder.config.num_hidden_layers
            if not 1 <= clip_skip <= layers:
                raise BadInput(f"clip_skip={clip_skip}: the model's text encoder has layers 1 (the last) to {layers}")
        self._sdxl = len(self._encoders) == 2
        self._zeros = self._sdxl and pipe.config.force_zeros_for_empty_prompt
        self._own_layer = 2 if self._sdxl else 1
        self._layer = max(clip_skip, self._own_layer)

    def encode_prompt(self, *args, **kwargs) -> tuple[Tensor | None, ...]:
        """Same arguments and result as the pipeline's. All prompts of a call get as many chunks as the longest."""
        given = self._signature.bind(*args, **kwargs).arguments
        if given.get("prompt") is None or given.get("prompt_embeds") is not None:
            return self._encode(**given)
        skipped = given.get("clip_skip")  # the pipeline's own option, which counts from its own layer
        layer = self._layer if skipped is None else self._own_layer + skipped
        texts = self._texts(given)
        for name, rows in texts.items():
            for text in rows:
                _check(text, name)
        found = {name: [chunks(text, self._tokenizer(name)) for text in rows] for name, rows in texts.items()}
        plain = all(
            self._is_plain(name, *pair) for name in texts for pair in zip(texts[name], found[name], strict=True)
        )
        if plain and layer == self._own_layer:
            named = [name for name in texts if given.get(name) is not None]
            return self._encode(**given | {name: _unescaped(given[name]) for name in named})
        return self._encode(**given | self._embeddings(found, layer))

    def _tokenizer(self, name: str) -> Any:
        return self._encoders[name.endswith("_2")][0]

    def _texts(self, given: dict[str, Any]) -> dict[str, list[str]]:
        """The texts to encode, by their argument; the second encoder's are called `prompt_2` and `negative_prompt_2`."""
        sides = ["prompt"]
        if given.get("do_classifier_free_guidance", True) and given.get("negative_prompt_embeds") is None:
            zeros = self._zeros and given.get("negative_prompt") is None
            sides += [] if zeros else ["negative_prompt"]
        rows, texts = 1 if isinstance(given["prompt"], str) else len(given["prompt"]), {}
        for side in sides:
            for name in (side, f"{side}_2")[: len(self._encoders)]:
                text = given.get(name) or given.get(side) or ""
                texts[name] = [text] * rows if isinstance(text, str) else text
        return texts

    def _is_plain(self, name: str, text: str, found: list[Chunk]) -> bool:
        """Whether the pipeline itself reads the same of the unescaped text."""
        ids = tuple(self._tokenizer(name)(_unescaped(text), add_special_tokens=False).input_ids)
        return found == [Chunk(ids, (1.0,) * len(ids))]

    def _embeddings(self, found: dict[str, list[list[Chunk]]], layer: int) -> dict[str, Tensor]:
        """The pipeline's arguments prompt_embeds (B, T, D), negative_prompt_embeds, and SDXL's pooled ones (B, P)."""
        length = max(len(row) for rows in found.values() for row in rows)
        embeddings = {}
        for side in dict.fromkeys(name.removesuffix("_2") for name in found):
            parts = [
                self._read(name, rows, length, layer) for name, rows in found.items() if name.removesuffix("_2") == side
            ]
            states, pooled = zip(*parts, strict=True)
            embeddings[f"{side}_embeds"] = torch.cat(states, dim=-1)
            if self._sdxl:
                embeddings[f"{side.replace('prompt', 'pooled_prompt')}_embeds"] = pooled[-1]
        return embeddings

    def _read(self, name: str, rows: list[list[Chunk]], length: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """States (B, T, D) of one encoder and, if it has it, the pooled text (B, P) of the first chunks."""
        read = functools.cache(lambda chunk: self._read_chunk(*self._encoders[name.endswith("_2")], chunk, layer))
        outputs = [[read(chunk) for chunk in row + [Chunk((), ())] * (length - len(row))] for row in rows]
        states = torch.cat([torch.cat([state for state, _ in row], dim=1) for row in outputs])
        pooled = [row[0][1] for row in outputs]
        return states, None if pooled[0] is None else torch.cat(pooled)

    def _read_chunk(self, tokenizer: Any, encoder: nn.Module, chunk: Chunk, layer: int) -> tuple[Tensor, Tensor | None]:
        padding = tokenizer.model_max_length - 2 - len(chunk.ids)
        ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id] + [tokenizer.pad_token_id] * padding
        output = encoder(torch.tensor([ids], device=encoder.device), output_hidden_states=True)
        states = output.hidden_states[-layer]
        if not self._sdxl:
            norm = next(m for path, m in encoder.named_modules() if path.endswith("final_layer_norm"))
            states = norm(states)
        if set(chunk.weights) - {1.0}:
            weights = [1.0, *chunk.weights, 1.0] + [1.0] * padding
            states = weighted(states, torch.tensor(weights, device=states.device))
        return states, output.get("text_embeds")


def _check(text: str, name: str) -> None:
    """Refuse what is no word. Raises BadInput, also for a LoRA by name, which generate.py has taken out of its prompts."""
    if found := next(constructs(text), None):
        raise BadInput(f"{name}: {found}")


def _unescaped(text: str | list[str]) -> str | list[str]:
    if isinstance(text, list):
        return [_unescaped(one) for one in text]
    return "".join(part.text for passage in parse(text) for part in passage)
