"""BERT samples, drawn as in Devlin et al. 2018 (arXiv 1810.04805): sentence pairs, 15 % of the tokens to predict, 80/10/10.

In: a `Shard` whose sequences are sentences, and a `Tokenizer` with [CLS], [SEP], [MASK] and [PAD]. Out: sample (index, epoch) as
{"ids" (s,), "labels" (s,) with -100 where nothing is predicted, "segments" (s,) 0 = A and 1 = B, "length" () of real tokens,
"next_sentence" () 1 = B comes from another document, 0 = B follows A}, int64.

Sample k of an epoch starts with the sentence that holds token k*s (plus a shift that changes with the epoch), found by bisection
in the memory-mapped index: opening builds nothing. All chance comes from a Philox counter (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") at (seed, epoch, k).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from megalite.data.causal import check_ids
from megalite.data.mixture import scramble
from megalite.data.shards import Shard
from megalite.errors import UserError

IGNORE = -100
SHORT = 0.1  # so many samples get a random shorter length, as in the paper
ROLES = ("pad", "cls", "sep", "mask")


class Vocabulary(Protocol):
    """What masking asks of a tokenizer."""

    special: dict[str, int]
    vocab_size: int

    def word_starts(self, ids: np.ndarray) -> np.ndarray: ...


class Masked:
    """Sentence pairs with masked tokens."""

    def __init__(self, shard: Shard, vocabulary: Vocabulary, *, sequence: int, seed: int, mask_fraction: float, whole_word: bool) -> None:
        self.shard, self.vocabulary, self.length, self.seed = shard, vocabulary, sequence, seed
        self.mask_fraction, self.whole_word = mask_fraction, whole_word
        missing = [role for role in ROLES if role not in vocabulary.special]
        if missing:
            raise UserError(
                f"model.family = bert needs the special tokens {', '.join(ROLES)}, the tokenizer of {shard.prefix} has no "
                f"{', '.join(missing)}; prepare the corpus with --tokenizer train:wordpiece or a BERT tokenizer"
            )
        if shard.num_documents < 2 or shard.num_sequences == shard.num_documents:
            raise UserError(
                f"shard {shard.prefix} holds {shard.num_documents} documents and {shard.num_sequences} sequences; BERT needs two documents "
                "or more, cut into sentences; prepare the corpus with --split-sentences"
            )
        if sequence < 8:
            raise UserError(f"data.sequence = {sequence} leaves no room for two sentences and 3 special tokens; choose 8 or more")
        if len(self) < 1:
            raise UserError(
                f"shard {shard.prefix} holds {shard.num_tokens} tokens, one sample needs {sequence - 3}; "
                "lower data.sequence or prepare more text"
            )
        self._special = np.zeros(vocabulary.vocab_size, bool)
        self._special[list(vocabulary.special.values())] = True
        self._ordinary = np.flatnonzero(~self._special)

    def __len__(self) -> int:
        return self.shard.num_tokens // (self.length - 3)

    def sample(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(key=self.seed % (1 << 64), counter=[0, 0, epoch, index]))
        room = self.length - 3
        shift = scramble(scramble(self.seed) ^ epoch) % room  # the same for a whole epoch, so that samples still tile the shard
        first, second, is_random = self._pair(index * room + shift, room, rng)
        special = self.vocabulary.special
        real = np.concatenate(([special["cls"]], first, [special["sep"]], second, [special["sep"]]))
        second_at = len(first) + 2
        check_ids(real, shard=self.shard, vocab_size=self.vocabulary.vocab_size)
        labels = self._mask(real, second_at, rng)
        padding = self.length - len(real)
        return {
            "ids": np.pad(real, (0, padding), constant_values=special["pad"]),
            "labels": np.pad(labels, (0, padding), constant_values=IGNORE),
            "segments": np.pad((np.arange(len(real)) >= second_at).astype(np.int64), (0, padding)),
            "length": np.array(len(real)),
            "next_sentence": np.array(int(is_random)),
        }

    def _pair(self, token: int, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, bool]:
        """Sentences A and B, together at most `room` tokens, and whether B comes from another document."""
        target = int(rng.integers(2, room + 1)) if rng.random() < SHORT else room
        at = self.shard.sequence_at(token)
        document = self.shard.document_at(at)
        sentences = self.shard.document(document)
        at = max(min(at, len(sentences) - 2 + sentences.start), sentences.start)  # leave a sentence for B where there is one
        chunk = self._take(at, sentences.stop, target, least=2)
        cut = int(rng.integers(1, len(chunk))) if len(chunk) > 1 else 1
        first = np.concatenate(chunk[:cut])
        is_random = bool(rng.random() < 0.5) or len(chunk) == 1
        if is_random:
            others = self._elsewhere(document, rng)
            start = int(rng.integers(others.start, others.stop))
            second = np.concatenate(self._take(start, others.stop, target - len(first), least=1))
        else:
            second = np.concatenate(chunk[cut:])
        return *_truncate(first, second, target, rng), is_random

    def _take(self, start: int, stop: int, target: int, *, least: int) -> list[np.ndarray]:
        """Whole sentences until there are `target` tokens and `least` sentences, or the document ends."""
        taken, total = [], 0
        for sentence in range(start, stop):
            taken.append(self.shard.sequence(sentence).astype(np.int64))
            total += len(taken[-1])
            if total >= target and len(taken) >= least:
                break
        return taken

    def _elsewhere(self, document: int, rng: np.random.Generator) -> range:
        """The sentences of another document, all alike likely."""
        for _ in range(100):  # documents without a sentence are drawn again
            other = int(rng.integers(self.shard.num_documents - 1))
            sentences = self.shard.document(other + (other >= document))
            if len(sentences):
                return sentences
        raise UserError(f"shard {self.shard.prefix}: 100 documents drawn at random hold no sentence; prepare the corpus again")

    def _mask(self, ids: np.ndarray, second_at: int, rng: np.random.Generator) -> np.ndarray:
        """Choose the tokens to predict, hide them in place, return the labels."""
        maskable = np.flatnonzero(~self._special[ids])
        wanted = max(1, round(len(maskable) * self.mask_fraction))
        if self.whole_word:
            starts = self.vocabulary.word_starts(ids)
            starts[[1, second_at]] = True  # a [SEP] and a cut end a word
            words = np.split(maskable, np.flatnonzero(starts[maskable])[1:])
            chosen = _choose_words(words, wanted, rng)
        else:
            chosen = rng.permutation(maskable)[:wanted]
        labels = np.full(len(ids), IGNORE, np.int64)
        labels[chosen] = ids[chosen]
        dice = rng.random(len(chosen))
        ids[chosen[dice < 0.8]] = self.vocabulary.special["mask"]
        replaced = chosen[dice >= 0.9]  # from 0.8 to 0.9 they stay what they are
        ids[replaced] = rng.choice(self._ordinary, len(replaced))
        return labels


def _truncate(first: np.ndarray, second: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut the longer of the two, token by token, at either end: the paper's truncate_seq_pair without its loop."""
    surplus = len(first) + len(second) - room
    if surplus <= 0:
        return first, second
    longer, shorter = (first, second) if len(first) > len(second) else (second, first)
    alone = min(surplus, len(longer) - len(shorter))  # until they are equally long, then in turn
    from_longer = alone + (surplus - alone) // 2
    from_shorter = surplus - from_longer
    pieces = []
    for piece, cut in ((longer, from_longer), (shorter, from_shorter)):
        front = int(rng.binomial(cut, 0.5))
        pieces.append(piece[front : len(piece) - (cut - front)])
    return (pieces[0], pieces[1]) if longer is first else (pieces[1], pieces[0])


def _choose_words(words: list[np.ndarray], wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Whole words in random order until `wanted` tokens are reached; a word that would exceed it is passed over."""
    chosen, count = [], 0
    for place in rng.permutation(len(words)):
        if count + len(words[place]) <= wanted:
            chosen.append(words[place])
            count += len(words[place])
        if count == wanted:
            break
    return np.concatenate(chosen) if chosen else words[int(rng.integers(len(words)))]
