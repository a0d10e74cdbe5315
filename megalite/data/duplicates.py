"""Documents that say the same: equal ones, and near ones by MinHash with locality-sensitive hashing.

In: for every document a `sketch`, made where the document is read.  Out: for every document the first one it repeats. Sketches lie in
the part files of a preparation; here one band of one share of the hashes is in memory at a time, beside 9 bytes a document, so memory does
not grow with the text.

MinHash: Broder 1997, by rensa. Banding: a pair is a candidate if all hashes of one band agree; 14 bands of 8 hashes over 5-grams of words
as in FineWeb (Penedo et al. 2024, arXiv:2406.17557, section 3.4). Candidates are then judged by all 112 hashes, so a chance agreement
of one band removes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field

from megalite.data.parts import read_part
from megalite.data.quality import WORD
from megalite.upkeep import Section

GRAM, BANDS, ROWS, SEED = 5, 14, 8, 1
SHARE = 1 << 22  # hashes sorted at once: some 200 MB
OPEN = 32  # parts whose MinHashes are kept in memory
KEPT, EXACT, NEAR = 0, 1, 2


class Duplicates(Section):
    """Which documents repeat another; of equal or near ones the first in the order of the input stays."""

    exact: bool = True
    """Equal but for white space and case."""
    near: bool = True
    """Alike by at least `threshold`."""
    threshold: float = Field(default=0.75, ge=0.5, le=1)
    """Shared 5-grams of words, out of all of both (Jaccard), as MinHash estimates it (its error is about 0.04)."""


def sketch(texts: Sequence[str], settings: Duplicates) -> dict[str, np.ndarray]:
    """exact (2, n) uint64; and for near ones minhash (n, 112) uint32 and bands (14, n) uint64."""
    words = [WORD.findall(text.lower()) for text in texts]
    digests = [hashlib.blake2b(" ".join(each).encode("utf-8", "surrogatepass"), digest_size=16).digest() for each in words]
    found = {"exact": np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2).T.copy()}
    if settings.near:
        import rensa

        grams = [[" ".join(each[k : k + GRAM]) for k in range(max(1, len(each) - GRAM + 1))] for each in words]
        rows = rensa.RMinHash.digests_from_token_sets(grams, BANDS * ROWS, SEED) if grams else []  # type: ignore
        minhash = np.array(rows, np.uint32).reshape(len(texts), BANDS * ROWS)
        found |= {"minhash": minhash, "bands": _fold(minhash)}
    return found


def _fold(minhash: np.ndarray) -> np.ndarray:
    """One number a band: (n, 112) -> (14, n)."""
    folded = np.zeros((len(minhash), BANDS), np.uint64)
    for row in np.moveaxis(minhash.reshape(-1, BANDS, ROWS).astype(np.uint64), -1, 0):
        folded = (folded ^ row) * np.uint64(0x9E3779B97F4A7C15)
        folded ^= folded >> np.uint64(29)
    return folded.T.copy()


class Finder:
    """Finds what repeats in the sketches of these parts, whose documents are numbered through, `counts` of them in each."""

    def __init__(self, parts: Sequence[Path], counts: Sequence[int], settings: Duplicates) -> None:
        self.parts, self.settings = parts, settings
        self.starts = np.cumsum([0, *counts])
        self.total = int(self.starts[-1])
        self.first = np.arange(self.total)  # a forest: every document points at an earlier one of its kind, or at itself
        self.how = np.zeros(self.total, np.uint8)
        self._minhash = lru_cache(OPEN)(lambda number: read_part(self.parts[number])[1]("minhash"))

    def find(self) -> tuple[np.ndarray, np.ndarray]:
        """(first, how): the number of the document that each repeats, its own where it stays; KEPT, EXACT or NEAR."""
        if self.settings.exact:
            self._join("exact", 0, EXACT, self._are_equal)
        if self.settings.near:
            for band in range(BANDS):
                self._join("bands", band, NEAR, self._are_near)
        for number in range(self.total):  # roots are earlier, so one pass flattens the forest
            self.first[number] = self.first[self.first[number]]
        return self.first, np.where(self.first == np.arange(self.total), KEPT, self.how)

    def _join(self, name: str, row: int, how: int, same: Callable[[int, int], bool]) -> None:
        """Join documents whose number `row` of sketch `name` is equal and that `same` confirms."""
        for keys, numbers in self._shares(name, row):
            order = np.lexsort((numbers, keys))
            keys, numbers = keys[order], numbers[order]
            head = 0  # where the run of equal keys began
            for at in np.flatnonzero(keys[1:] == keys[:-1]) + 1:
                if keys[head] != keys[at]:
                    head = int(at) - 1
                number = int(numbers[at])
                for other in {int(numbers[head]), int(numbers[at - 1])}:
                    if self._root(other) != self._root(number) and same(other, number):
                        self._unite(other, number, how)

    def _shares(self, name: str, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The hashes of one row with their documents, a share of all hashes at a time."""
        num = -(-self.total // SHARE)
        for share in range(num):
            keys, numbers = [], []
            for start, path in zip(self.starts, self.parts, strict=False):
                found = read_part(path)[1](name)[row]
                mine = np.flatnonzero(found % np.uint64(num) == share) if num > 1 else np.arange(len(found))
                keys.append(found[mine])
                numbers.append(start + mine)
            yield np.concatenate(keys), np.concatenate(numbers)

    def _root(self, number: int) -> int:
        while self.first[number] != number:
            self.first[number] = self.first[self.first[number]]
            number = int(self.first[number])
        return number

    def _unite(self, one: int, other: int, how: int) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self.first[high] = low
        self.how[high] = how
        if self.how[other] == KEPT:
            self.how[other] = how

    def locate(self, number: int) -> tuple[int, int]:
        """(part, place in it) of a document."""
        part = int(np.searchsorted(self.starts, number, side="right")) - 1
        return part, number - int(self.starts[part])

    def _are_equal(self, one: int, other: int) -> bool:
        """By the other half of the hash."""
        (a, i), (b, j) = self.locate(one), self.locate(other)
        return bool(read_part(self.parts[a])[1]("exact")[1, i] == read_part(self.parts[b])[1]("exact")[1, j])

    def _are_near(self, one: int, other: int) -> bool:
        (a, i), (b, j) = self.locate(one), self.locate(other)
        return bool(np.mean(self._minhash(a)[i] == self._minhash(b)[j]) >= self.settings.threshold)
