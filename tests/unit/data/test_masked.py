"""BERT samples against the paper: pairs, 15 %, 80/10/10, whole words; and the same again for the same (seed, epoch, index)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalite.data.masked import IGNORE, Masked
from megalite.data.shards import Shard, Writer
from megalite.errors import UserError

PAD, CLS, SEP, MASK = range(4)
DOCUMENTS, STRIDE = 150, 1000  # token = 10 + document * STRIDE + its place in the document
SEQUENCE = 64


class Words:
    """A vocabulary where every third place in a document begins a word."""

    special = {"pad": PAD, "cls": CLS, "sep": SEP, "mask": MASK}
    vocab_size = 10 + DOCUMENTS * STRIDE

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        return (ids - 10) % STRIDE % 3 == 0


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("sentences") / "sentences"
    with Writer(path, vocab_size=Words.vocab_size) as writer:
        for document in range(DOCUMENTS):
            lengths = rng.integers(1, 25, rng.integers(2, 40))
            writer.add(10 + document * STRIDE + np.arange(lengths.sum()), lengths=lengths)
    return path


def dataset(prefix: Path, **settings) -> Masked:
    return Masked(Shard(prefix), Words(), **{"sequence": SEQUENCE, "seed": 7, "mask_fraction": 0.15, "whole_word": False, **settings})


def unmasked(sample: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens before masking."""
    return np.where(sample["labels"] == IGNORE, sample["ids"], sample["labels"])[: int(sample["length"])]


@pytest.fixture(scope="module")
def samples(prefix) -> list[dict[str, np.ndarray]]:
    data = dataset(prefix)
    return [data.sample(index, epoch) for epoch in range(3) for index in range(len(data))]


def test_a_sample_is_cls_a_sep_b_sep_and_padding(samples):
    for sample in samples:
        length, ids = int(sample["length"]), unmasked(sample)
        assert all(sample[name].shape == (SEQUENCE,) and sample[name].dtype == np.int64 for name in ("ids", "labels", "segments"))
        middle = int(np.flatnonzero(ids == SEP)[0])
        assert ids[0] == CLS
        assert np.flatnonzero(ids == SEP).tolist() == [middle, length - 1]
        assert 1 < middle < length - 2
        assert (sample["ids"][length:] == PAD).all()
        assert sample["segments"].tolist() == [0] * (middle + 1) + [1] * (length - middle - 1) + [0] * (SEQUENCE - length)


def test_b_follows_a_or_comes_from_another_document(samples):
    for sample in samples:
        ids = unmasked(sample)
        middle = int(np.flatnonzero(ids == SEP)[0])
        first, second = ids[1:middle], ids[middle + 1 : -1]
        assert (np.diff(first) == 1).all()
        assert (np.diff(second) == 1).all()
        if sample["next_sentence"]:
            assert (first[0] - 10) // STRIDE != (second[0] - 10) // STRIDE
        else:
            assert (first[0] - 10) // STRIDE == (second[0] - 10) // STRIDE
            assert second[0] > first[-1]


def test_half_of_the_pairs_are_random(samples):
    random = sum(int(s["next_sentence"]) for s in samples)
    assert abs(random - len(samples) / 2) < 4 * (len(samples) / 4) ** 0.5


def test_most_samples_are_full_and_a_tenth_is_short(samples):
    lengths = np.array([int(s["length"]) for s in samples])
    assert lengths.max() == SEQUENCE
    assert np.median(lengths) > 0.9 * SEQUENCE
    assert 0.05 < (lengths < SEQUENCE / 2).mean() < 0.25


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("fraction", [0.15, 0.4])
def test_the_chosen_share_of_tokens_is_predicted_and_80_10_10_is_kept(prefix, whole_word, fraction):
    data = dataset(prefix, whole_word=whole_word, mask_fraction=fraction)
    found = [data.sample(index, 0) for index in range(len(data))]
    chosen = [s["labels"] != IGNORE for s in found]
    for sample, mine in zip(found, chosen, strict=True):
        wanted = max(1, round((int(sample["length"]) - 3) * fraction))
        assert (mine.sum() == wanted) or (whole_word and wanted - 3 < mine.sum() <= max(wanted, 3))
        assert not np.isin(sample["labels"][mine], [PAD, CLS, SEP, MASK]).any()
        assert not mine[int(sample["length"]) :].any()
    ids, labels = (np.concatenate([s[name][mine] for s, mine in zip(found, chosen, strict=True)]) for name in ("ids", "labels"))
    masked, kept = ids == MASK, ids == labels
    replaced = ids[~masked & ~kept]
    for count, share in ((masked.sum(), 0.8), (kept.sum(), 0.1), (len(replaced), 0.1)):
        assert abs(count - len(ids) * share) < 4 * (len(ids) * share * (1 - share)) ** 0.5
    assert replaced.min() >= 4  # never a special token
    assert len(set(replaced.tolist())) > 0.9 * len(replaced)
    if not whole_word:
        places = np.concatenate([np.flatnonzero(m) / (int(s["length"]) - 1) for s, m in zip(found, chosen, strict=True)])
        assert abs(places.mean() - 0.5) < 0.02  # anywhere in the sample


def test_whole_words_are_masked_together(prefix):
    data = dataset(prefix, whole_word=True)
    for index in range(len(data)):
        sample = data.sample(index, 0)
        ids, chosen = unmasked(sample), sample["labels"] != IGNORE
        words = np.cumsum(Words().word_starts(ids) | (np.diff(ids, prepend=ids[0] - 1) != 1))
        for word in range(1, words.max() + 1):
            mine = chosen[: len(ids)][(words == word) & (ids > MASK)]
            assert mine.all() or not mine.any()


def test_samples_are_a_function_of_seed_epoch_and_index(prefix):
    def everything(seed, epoch):
        data = dataset(prefix, seed=seed)
        return [tuple(v.tobytes() for v in data.sample(i, epoch).values()) for i in (5, 3, 5, 17)]

    first = everything(7, 1)
    assert first == everything(7, 1)
    assert first[0] == first[2]
    assert len({x for key in [(7, 1), (7, 2), (8, 1)] for x in everything(*key)}) == 9


def test_an_epoch_begins_a_sample_in_every_part_of_the_shard(prefix):
    data = dataset(prefix)
    room, sentence = SEQUENCE - 3, 25
    firsts = [int(unmasked(data.sample(index, 0))[1]) for index in range(len(data))]
    stream = {int(t): place for place, t in enumerate(data.shard.tokens(0, data.shard.num_tokens))}
    for index, token in enumerate(firsts):
        assert (index - 1) * room - 2 * sentence < stream[token] < (index + 1) * room + room


def test_shards_without_sentences_are_refused(tmp_path):
    with Writer(tmp_path / "gpt", vocab_size=100) as writer:
        for _ in range(5):
            writer.add(np.arange(10, 90))
    with pytest.raises(
        UserError, match=r"holds 5 documents and 5 sequences; BERT needs two documents or more, cut into sentences; .*--split-sentences"
    ):
        dataset(tmp_path / "gpt")


def test_a_tokenizer_without_a_mask_is_refused(prefix):
    vocabulary = Words()
    vocabulary.special = {"eos": 0, "pad": 1}
    with pytest.raises(
        UserError, match=r"needs the special tokens pad, cls, sep, mask, the tokenizer of .* has no cls, sep, mask; prepare"
    ):
        Masked(Shard(prefix), vocabulary, sequence=64, seed=0, mask_fraction=0.15, whole_word=False)


def test_a_shard_shorter_than_a_sample_is_refused(tmp_path):
    with Writer(tmp_path / "short", vocab_size=100) as writer:
        writer.add(np.arange(10, 20), lengths=np.array([5, 5]))
        writer.add(np.arange(10, 20), lengths=np.array([5, 5]))
    with pytest.raises(UserError, match=r"holds 20 tokens, one sample needs 61; lower data.sequence or prepare more text"):
        dataset(tmp_path / "short")
    dataset(tmp_path / "short", sequence=16).sample(0, 0)
