"""What a vocabulary of byte-level BPE (Sennrich et al. 2016) does to text beyond Latin, for all words of a batch at once.

In: a BPE model of `tokenizers`. Out: `Joins`, which neighbouring characters some entry holds side by side; where none does, no merge goes
over their border, for every merge makes an entry. And `Merges`, the ids of words, from one token a character. That is what the
merges of the bytes come to, if

- no entry joins a part of a character with a neighbour (else `Joins` says so): then what is merged inside a character does not
  depend on its neighbours, and all other merges are between tokens of whole characters;
- every such merge ranks behind all that its characters need to become one token each: then, whenever its turn comes, they are. This is
  checked for all merges when the vocabulary is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tokenizers

FAR = "\u0250"  # the first character beyond Latin
CHARACTERS = 0x110000
APART, WHOLE, PARTLY = range(3)  # not joined; joined, whole characters only; joined, parts of characters too
SEVERAL, NOTHING = -1, -2  # in place of the id of a character that is several tokens, or none
KEYS = 1 << 14  # of 16 bits; Chinese vocabularies have some 8,000
LAST = np.iinfo(np.int32).max  # the rank of two tokens that do not merge


class TooMany(Exception):
    """More characters are joined than there is room for."""


class Joins:
    """Which two neighbouring characters some entry holds, whole or in part, side by side.

    An answer for every two `keys`: characters, and beginnings or ends of their UTF-8, as the entries have them. A character stands for
    its longest key; keys inherit from the shorter ones that they contain. Entries that are `unreachable` by merges must not become
    words of their own: nothing parts them from their neighbours.
    """

    def __init__(self, entries: Iterable[bytes], unreachable: Iterable[bytes] = ()) -> None:
        pairs = {pair for entry in entries for pair in pairwise(_characters(entry)) if pair[1] >= FAR.encode()[:1]}
        loners = [_characters(entry) for entry in unreachable]
        self._rows = _numbered([left for left, _ in pairs] + [characters[-1] for characters in loners])
        self._columns = _numbered([right for _, right in pairs] + [characters[0] for characters in loners])
        if max(len(self._rows), len(self._columns)) > KEYS:
            raise TooMany
        joined = np.zeros((2, len(self._rows), len(self._columns)), bool)  # at all, in part
        for left, right in pairs:
            place = self._rows[left], self._columns[right]
            joined[:, *place] |= True, not (_is_whole(left) and _is_whole(right))
        for characters in loners:
            joined[:, self._rows[characters[-1]]] = joined[:, :, self._columns[characters[0]]] = True
            for left, right in pairwise(characters):
                if right >= FAR.encode()[:1]:
                    joined[:, self._rows[left], self._columns[right]] = True
        for key, row in list(self._rows.items())[1:]:  # the shortest first
            joined[:, row] |= joined[:, _longest(self._rows, _ends(key[1:]))]
        for key, column in list(self._columns.items())[1:]:
            joined[:, :, column] |= joined[:, :, _longest(self._columns, _beginnings(key[:-1]))]
        self._joined = np.packbits(joined, axis=2, bitorder="little")
        self._row, self._column = np.zeros((2, CHARACTERS), np.uint16)

    def learn(self, code: int) -> None:
        """Note the keys of a character."""
        spelled = chr(code).encode("utf-8", "surrogatepass")
        self._row[code] = _longest(self._rows, _ends(spelled))
        self._column[code] = _longest(self._columns, _beginnings(spelled))

    def between(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """For characters (n,) and the ones behind them, by code point: APART, WHOLE or PARTLY."""
        row, column = self._row[left], self._column[right]
        at_all, in_part = self._joined[:, row, column >> 3] >> (column & 7).astype(np.uint8) & 1
        return at_all + in_part


def _characters(entry: bytes) -> list[bytes]:
    """The characters of an entry, the first and the last perhaps cut."""
    return re.findall(rb"[\0-\x7f\xc0-\xff][\x80-\xbf]*|^[\x80-\xbf]+", entry)


def _is_whole(spelled: bytes) -> bool:
    try:
        return len(spelled.decode()) == 1
    except UnicodeDecodeError:
        return False


def _numbered(keys: list[bytes]) -> dict[bytes, int]:
    return {key: number for number, key in enumerate(sorted({b"", *keys}, key=lambda key: (len(key), key)))}


def _ends(spelled: bytes) -> list[bytes]:
    return [spelled[at:] for at in range(len(spelled) + 1)]


def _beginnings(spelled: bytes) -> list[bytes]:
    return [spelled[:at] for at in range(len(spelled), -1, -1)]


def _longest(numbers: dict[bytes, int], keys: list[bytes]) -> int:
    return next(numbers[key] for key in keys if key in numbers)


class Single:
    """Ids of single characters, for any tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._encode = backend.encode
        self.ids = np.full(CHARACTERS, SEVERAL, np.int32)

    def learn(self, code: int) -> None:
        """Note the id of a character, NOTHING or SEVERAL."""
        ids = self._encode(chr(code), add_special_tokens=False).ids
        self.ids[code] = ids[0] if len(ids) == 1 else SEVERAL if ids else NOTHING

    def merge(self, tokens: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Every character is a word."""
        return tokens, words


class Merges:
    """Ids of pieces, pairs of pieces that merge, in order, and the byte of every letter that pieces are written with."""

    def __init__(self, vocabulary: dict[str, int], pairs: list[tuple[str, str]], byte_of: dict[int, str], joins: Joins) -> None:
        self.ids = np.full(CHARACTERS, SEVERAL, np.int32)
        """The id of a character that is one token; SEVERAL for others, and for those not learnt."""
        self._vocabulary = vocabulary
        self._letters = {ord(byte): chr(letter) for letter, byte in byte_of.items()}
        self._inside = {pair: rank for rank, pair in enumerate(pairs) if len(pair[0] + pair[1]) <= 4}  # of a character's bytes
        self._depths: dict[int, int] = {}
        words = {rank: word for rank, pair in enumerate(pairs) if (word := _word(*pair, byte_of))}
        deepest, partly = self._examine(list(words.values()), joins)
        # The turn of the others never comes: a character does not become one token, or the word is for the tokenizer.
        ranks = np.array(list(words), np.int64)[kept := (deepest < LAST) & ~partly]
        self.sound = bool((deepest[kept] < ranks).all())
        merged = [pairs[rank] for rank in ranks.tolist()]
        self._made = np.zeros(len(pairs), np.int32)
        self._made[ranks] = [vocabulary[left + right] for left, right in merged]
        keys = np.array([vocabulary[left] << 32 | vocabulary[right] for left, right in merged], np.int64)
        order = np.argsort(keys)
        self._keys, self._ranks = np.append(keys[order], np.iinfo(np.int64).max), np.append(ranks[order], LAST)

    def _examine(self, words: list[str], joins: Joins) -> tuple[np.ndarray, np.ndarray]:
        """Of every word, the highest rank that one of its characters takes, and whether an entry joins parts of its characters."""
        codes = np.frombuffer("".join(words).encode("utf-32-le"), np.uint32)
        owner = np.repeat(np.arange(len(words)), list(map(len, words)))
        known, place = np.unique(codes, return_inverse=True)
        for code in known.tolist():
            joins.learn(code)
        depths = np.array([self.learn(code) for code in known.tolist()], np.int64)
        deepest = np.full(len(words), -1, np.int64)
        np.maximum.at(deepest, owner, depths[place])
        partly = np.zeros(len(words), bool)
        inside = np.flatnonzero(owner[:-1] == owner[1:])
        partly[owner[inside[joins.between(codes[inside], codes[inside + 1]) == PARTLY]]] = True
        return deepest, partly

    def learn(self, code: int) -> int:
        """Note the id of a character; the highest rank among the merges that make it one token, LAST if none do."""
        if code not in self._depths:
            pieces = [self._letters[byte] for byte in chr(code).encode("utf-8", "surrogatepass")]
            depth = -1
            while len(pieces) > 1 and depth < LAST:
                rank, at = min((self._inside.get(pair, LAST), at) for at, pair in enumerate(pairwise(pieces)))
                depth = max(depth, rank)
                pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
            self._depths[code] = depth
            if depth < LAST:
                self.ids[code] = self._vocabulary[pieces[0]]
        return self._depths[code]

    def merge(self, tokens: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of characters (n,) and the number of everyone's word, ascending; the same of the tokens that they become."""
        ranks = np.full(max(len(tokens) - 1, 0), LAST, np.int64)
        together = np.flatnonzero(words[:-1] == words[1:])
        ranks[together] = self._rank(tokens, words, together)
        while len(at := np.flatnonzero(ranks < LAST)):
            # In every word the leftmost pair of the least rank
            first = np.flatnonzero(np.diff(words[at], prepend=-1))
            least = np.repeat(np.minimum.reduceat(ranks[at], first), np.diff(first, append=len(at)))
            at = at[ranks[at] == least]
            at = at[np.diff(words[at], prepend=-1) != 0]
            tokens[at] = self._made[ranks[at]]
            tokens, words, ranks = np.delete(tokens, at + 1), np.delete(words, at + 1), np.delete(ranks, at)
            at -= np.arange(len(at))  # where they lie now
            changed = np.concatenate((at[at > 0] - 1, at[at < len(ranks)]))
            ranks[changed] = self._rank(tokens, words, changed)
        return tokens, words

    def _rank(self, tokens: np.ndarray, words: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The ranks of the pairs that begin there."""
        keys = tokens[at].astype(np.int64) << 32 | tokens[at + 1]
        found = np.searchsorted(self._keys, keys)
        return np.where((self._keys[found] == keys) & (words[at] == words[at + 1]), self._ranks[found], LAST)


def _word(left: str, right: str, byte_of: dict[int, str]) -> str:
    """The text of two pieces if it is whole characters, all but the first beyond Latin; else nothing."""
    if right.isascii():
        return ""
    try:
        texts = [piece.translate(byte_of).encode("latin-1").decode() for piece in (right, left)]
    except UnicodeError:
        return ""
    word = texts[1] + texts[0]
    return word if min(word[1:]) >= FAR else ""


def read_model(backend: tokenizers.Tokenizer) -> tuple[Joins, Merges | None] | None:
    """None where a word's ids are more than the merges of its bytes, or (for the second) their order is not as told above."""
    from tokenizers import models

    model: Any = backend.model
    vocabulary = backend.get_vocab(with_added_tokens=False)
    byte_of = _byte_of_letter()
    if not isinstance(model, models.BPE) or model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not all(chr(letter) in vocabulary for letter in byte_of):
        return None  # some bytes are unknown, and neighbours that are unknown become one
    spelled = {piece: piece.translate(byte_of) for piece in vocabulary}
    entries = {piece: text.encode("latin-1") for piece, text in spelled.items() if piece and max(text) <= "\xff"}
    unreachable = [entries[piece] for piece in _unreachable(model, vocabulary) if piece in entries]
    written = (merge.split(" ") if isinstance(merge, str) else merge for merge in json.loads(model.__getstate__())["merges"])
    try:
        joins = Joins(entries.values(), unreachable)
    except TooMany:
        return None
    merges = Merges(vocabulary, [(left, right) for left, right in written], byte_of, joins)
    return joins, merges if merges.sound else None


def _unreachable(model: Any, vocabulary: dict[str, int]) -> list[str]:
    """Entries that merges do not make; a word that is one becomes it where `ignore_merges` is set, but a part of a word does not."""
    if not model.ignore_merges:
        return []
    model.ignore_merges = False
    try:
        return [piece for piece, number in vocabulary.items() if piece and [token.id for token in model.tokenize(piece)] != [number]]
    finally:
        model.ignore_merges = True


def _byte_of_letter() -> dict[int, str]:
    """The letters that byte-level BPE writes bytes with: a printable one stands for itself, those from 256 on for the others in turn."""
    from tokenizers import pre_tokenizers

    letters = sorted(map(ord, pre_tokenizers.ByteLevel.alphabet()))
    others = (byte for byte in range(256) if byte not in letters)
    return {letter: chr(letter if letter < 256 else next(others)) for letter in letters}
