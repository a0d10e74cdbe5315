"""Encodes text part by part: the same ids as the tokenizer's own, in a fraction of the time.

In: texts. Out: their ids. Text is cut where that changes nothing (`cuts.py`), mostly into words, and text repeats its words: a
dictionary knows most of them, the tokenizer gets the others, each once. Parts that are one token, and words whose characters are, as
in Chinese, which repeats fewer, need neither (`merges.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megalite.data.cuts import CUT, NO, Cuts
from megalite.data.merges import NOTHING, SEVERAL

GROUP = 1 << 18  # characters encoded at once; each takes some tens of bytes meanwhile
MEMORY = 32 << 20  # bytes, about, that the known parts may take


def groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbours, together of some GROUP characters."""
    number = np.cumsum([0, *map(len, texts)])[:-1] // GROUP
    cuts = (np.flatnonzero(np.diff(number)) + 1).tolist()
    return (texts[begin:end] for begin, end in pairwise([0, *cuts, len(texts)]))


class Words:
    """Texts to ids.

    `encode` is the tokenizer's own way, int32 for every text; `added` the spellings that it looks for before it splits a text.
    """

    def __init__(self, cuts: Cuts, added: Sequence[str], encode: Callable[[list[str]], Iterable[bytes]]) -> None:
        self._cuts, self._encode = cuts, encode
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._known: dict[str, bytes] = {}
        self._held = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """All ids in a row, int32, and how many each text has."""
        joined = "".join(texts)
        if not joined:
            return np.empty(0, np.int32), np.zeros(len(texts), np.int64)
        codes = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
        borders = np.cumsum([0, *map(len, texts)])
        between = self._cut(texts, codes, borders)
        ends = np.flatnonzero(between == CUT) + 1
        begins = np.append(0, ends[:-1])
        part = np.repeat(np.arange(len(ends)), ends - begins)  # of every character
        tokens = self._cuts.simple.ids[codes]
        simple = np.ones(len(ends), bool)
        simple[part[(between == NO) | (tokens == SEVERAL)]] = False
        hard = np.flatnonzero(~simple)
        counts = np.zeros(len(ends), np.int64)
        known, counts[hard] = self._remember([joined[a:b] for a, b in zip(begins[hard].tolist(), ends[hard].tolist(), strict=True)])
        there = simple[part] & (tokens != NOTHING)
        tokens, owners = self._cuts.simple.merge(tokens[there], part[there])
        counts += np.bincount(owners, minlength=len(counts))
        is_simple = np.repeat(simple, counts)
        flat = np.empty(len(is_simple), np.int32)
        flat[is_simple], flat[~is_simple] = tokens, known
        return flat, np.diff(np.append(0, np.cumsum(counts))[np.searchsorted(begins, borders)])

    def _cut(self, texts: Sequence[str], codes: np.ndarray, borders: np.ndarray) -> np.ndarray:
        """What lies behind every character (n,): CUT, NO or MERGES."""
        between = self._cuts.find(codes, borders[1:][np.diff(borders) > 0] - 1)
        if self._added:
            for text, begin, end in zip(texts, borders[:-1], borders[1:], strict=True):
                if self._added.search(text):
                    between[begin : end - 1] = NO
        return between

    def _remember(self, parts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of parts in a row, and how many each has."""
        if self._held > MEMORY:
            self._known.clear()
            self._held = 0
        found: list[Any] = list(map(self._known.get, parts))
        gaps = [at for at, ids in enumerate(found) if ids is None]
        if gaps:
            missing = list({parts[at] for at in gaps})
            self._known.update(zip(missing, self._encode(missing), strict=True))
            self._held += sum(200 + 8 * len(part) for part in missing)
            for at in gaps:
                found[at] = self._known[parts[at]]
        return np.frombuffer(bytearray().join(found), np.int32), np.fromiter(map(len, found), np.int64, len(found)) // 4
