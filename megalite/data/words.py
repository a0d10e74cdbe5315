"""Encodes text word by word from memory: the same ids as the tokenizer's own, at a third of the time.

Byte-level BPE first splits text into words by a regular expression, then encodes every word by itself. Text repeats its words, so a
dictionary knows most of them; the tokenizer gets the others, each once. The expression runs in Python's `re`, hence only over characters
whose class has been the same in every Unicode version; a text with any other goes to the tokenizer as a whole, as does everything if the
tokenizer splits in a way not listed here.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tokenizers

OTHER = re.compile("[^\0-\u017e\u2010-\u2027\u2030-\u205e€]")  # beyond Latin letters and common punctuation
CLASSES = {  # within those characters
    r"\p{L}": "A-Za-zªµºÀ-ÖØ-öø-\u017e",
    r"\p{N}": "0-9²³¹¼-¾",
    r"\s": "\t-\r \x85\xa0",
}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3's, also cl100k's
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
MEMORY = 32 << 20  # bytes, about, that the known words may take


class Words:
    """Texts to ids; `encode` is the tokenizer's own way."""

    def __init__(self, pattern: str, added: Sequence[str], encode: Callable[[list[str]], list[list[int]]]) -> None:
        self._find = re.compile(_for_python(pattern)).findall
        self._other = re.compile("|".join([OTHER.pattern, *map(re.escape, added)]))
        self._encode = encode
        self._known: dict[str, bytes] = {}
        self._held = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of every text, as int32."""
        if self._held > MEMORY:
            self._known.clear()
            self._held = 0
        found = [None if self._other.search(text) else self._find(text) for text in texts]
        missing = list(set().union(*filter(None, found)).difference(self._known))
        others = [text for text, words in zip(texts, found, strict=True) if words is None]
        ids = map(_packed, self._encode([*missing, *others]))
        self._known.update(zip(missing, ids, strict=False))  # `ids` goes on with the others
        self._held += sum(200 + 5 * len(word) for word in missing)
        known = self._known.__getitem__
        return [next(ids) if words is None else b"".join(map(known, words)) for words in found]


def _packed(ids: list[int]) -> bytes:
    return array("i", ids).tobytes()


def _for_python(pattern: str) -> str:
    def spelled(match: re.Match[str]) -> str:
        piece = match[0]
        if piece == r"\S":
            return "[^" + CLASSES[r"\s"] + "]"
        for name, members in CLASSES.items():
            piece = piece.replace(name, members)
        return piece if match[0].startswith("[") else f"[{piece}]"

    return re.sub(r"\[[^]]*\]|\\p\{[LN]\}|\\[sS]", spelled, pattern)


def words_of(backend: tokenizers.Tokenizer, encode: Callable[[list[str]], list[list[int]]]) -> Words | None:
    """The quick way for this tokenizer, if there is one."""

    def state(part: object) -> dict:
        return json.loads(part.__getstate__()) if part is not None else {}  # pyright: ignore

    splitter = state(backend.pre_tokenizer)
    steps = splitter.get("pretokenizers", [splitter])
    byte_level = steps[-1]
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"] or getattr(backend.model, "dropout", None):
        return None
    if state(backend.normalizer).get("type", "NFC") != "NFC":  # which changes none of these characters
        return None
    if len(steps) == 1 and byte_level.get("use_regex", True):
        pattern = GPT2
    elif len(steps) == 2 and not byte_level.get("use_regex", True) and steps[0].get("type") == "Split":
        pattern = steps[0]["pattern"].get("Regex")
        if steps[0]["behavior"] != "Isolated" or steps[0]["invert"]:
            return None
    else:
        return None
    added = [token.content for token in backend.get_added_tokens_decoder().values() if not token.special]
    return Words(pattern, added, encode) if pattern in (GPT2, LLAMA3, QWEN2) else None
