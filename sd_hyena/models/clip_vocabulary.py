"""CLIP's tokenizer from the published merges (see NOTICE): single files hold no vocabulary."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Any

MERGES = Path(__file__).with_name("clip_vocabulary.txt.gz")
USED = 48894  # of its 262 144 merges: with 2 x 256 bytes and two marks they make 49 408 tokens
LENGTH = 77


@cache
def merges_and_ids() -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The merges in their order, and the id of each token."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")[1 : USED + 1]
    merges = [tuple(line.split()) for line in lines]
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]  # one letter for each byte
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return merges, {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(pad_token: str) -> Any:
    """A CLIPTokenizer of 77 tokens. CLIP-L pads with its end mark, OpenCLIP's models with "!", whose id is 0."""
    from transformers import CLIPTokenizer

    merges, ids = merges_and_ids()
    return CLIPTokenizer(vocab=ids, merges=merges, pad_token=pad_token, model_max_length=LENGTH)
