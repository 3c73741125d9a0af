"""Words that stand for vectors: found in a prompt as whole words, whatever the tokenizer makes of their letters.

Their vectors are rows of the text encoders behind the tokenizer's own, so no text that is no such word can meet them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from sd_hyena.errors import BadInput

FOR_COMFYUI = r"(?P<comfyui>(?<!\w)embedding:)?", r"(?(comfyui)(?:\.(?:pt|bin|safetensors))?)"  # embedding:word.pt
BRACKETS = re.compile(r"[()\[\]\\]")


def key_of(word: str) -> str:
    """Spellings that are one word have one key."""
    return " ".join(unicodedata.normalize("NFC", word).lower().split())


class Words:
    """Rows by word, `rows` {word: (row, ...)}; and why words of `unusable` {word: reason} cannot be had.

    Words are matched longest first, at the borders of words, blind to case and to how often a blank is pressed.
    """

    def __init__(self, rows: Mapping[str, tuple[int, ...]], unusable: Mapping[str, str] | None = None):
        self._rows = {key_of(word): ids for word, ids in rows.items()}
        self._unusable = {key_of(word): reason for word, reason in (unusable or {}).items()}
        known = sorted({*self._rows, *self._unusable} - {""}, key=len, reverse=True)
        self._pattern = _pattern(known)
        self._bracketed = _pattern([word for word in known if BRACKETS.search(word)])

    def escaped(self, prompt: str) -> str:
        """The prompt in which the brackets of words are text, not grammar."""
        if self._bracketed is None:
            return prompt
        return self._bracketed.sub(
            lambda match: BRACKETS.sub(r"\\\g<0>", match[0]), unicodedata.normalize("NFC", prompt)
        )

    def found(self, text: str) -> Iterator[str | tuple[int, ...]]:
        """The text in pieces: plain text, and in place of each word its rows. Raises BadInput for an unusable word."""
        if self._pattern is None:
            yield text
            return
        text, end = unicodedata.normalize("NFC", text), 0
        for match in self._pattern.finditer(text):
            word = key_of(match["word"])
            if word not in self._rows:
                raise BadInput(f"{match[0]!r} in the prompt: {self._unusable[word]}")
            yield text[end : match.start()]
            yield self._rows[word]
            end = match.end()
        yield text[end:]


def words_of(tokenizer: Any) -> Words:
    """The words that were taught along with a tokenizer."""
    return getattr(tokenizer, "sd_hyena_words", None) or Words({})


def teach(tokenizer: Any, words: Words) -> None:
    tokenizer.sd_hyena_words = words


def _pattern(words: list[str]) -> re.Pattern | None:
    """Any of the words, the first that fits; where a word begins or ends with a letter, no other may be beside it."""
    if not words:
        return None
    each = "|".join(f"{_border(word[0], '<!')}{_spelt(word)}{_border(word[-1], '!')}" for word in words)
    return re.compile(f"(?P<word>{each})".join(FOR_COMFYUI), re.IGNORECASE)


def _border(letter: str, behind: str) -> str:
    return rf"(?{behind}\w)" if re.match(r"\w", letter) else ""


def _spelt(word: str) -> str:
    return r"\s+".join(map(re.escape, word.split(" ")))
