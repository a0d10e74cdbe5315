"""Shards against Megatron's documented bytes, written here by hand."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from megalite.data.shards import Shard, Writer, unigram_entropy
from megalite.errors import UserError

# Two documents: [[5, 6, 7], [8]] and [[9, 10]].
BIN = struct.pack("<6H", 5, 6, 7, 8, 9, 10)
IDX = (
    b"MMIDIDX\x00\x00"
    + struct.pack("<Q", 1)  # version
    + struct.pack("<B", 8)  # uint16
    + struct.pack("<QQ", 3, 3)  # sequences, boundaries = documents + 1
    + struct.pack("<3i", 3, 1, 2)  # lengths in tokens
    + struct.pack("<3q", 0, 6, 8)  # offsets in bytes
    + struct.pack("<3q", 0, 2, 3)  # first sequence of every document, and the end
)


@pytest.fixture
def by_hand(tmp_path: Path) -> Path:
    (tmp_path / "hand.bin").write_bytes(BIN)
    (tmp_path / "hand.idx").write_bytes(IDX)
    return tmp_path / "hand"


def test_the_writer_writes_the_documented_bytes(tmp_path):
    with Writer(tmp_path / "ours", vocab_size=100) as writer:
        writer.add(np.array([5, 6, 7, 8]), lengths=np.array([3, 1]))
        writer.add(np.array([9, 10]))
    assert (tmp_path / "ours.bin").read_bytes() == BIN
    assert (tmp_path / "ours.idx").read_bytes() == IDX
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.bin", "ours.idx"]


def test_a_document_may_arrive_in_parts(tmp_path):
    with Writer(tmp_path / "ours", vocab_size=100) as writer:
        writer.add(np.array([5, 6, 7]), lengths=np.array([3]), ends=np.array([], np.int64))
        writer.add(np.array([8, 9, 10]), lengths=np.array([1, 2]), ends=np.array([1, 2]))
    assert (tmp_path / "ours.idx").read_bytes() == IDX


def test_a_shard_reads_the_documented_bytes(by_hand):
    shard = Shard(by_hand)
    assert (shard.num_tokens, shard.num_sequences, shard.num_documents) == (6, 3, 2)
    assert shard.tokens(2, 5).tolist() == [7, 8, 9]
    assert [shard.sequence(i).tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 10]]
    assert [shard.sequence_at(t) for t in range(6)] == [0, 0, 0, 1, 2, 2]
    assert [shard.document_at(s) for s in range(3)] == [0, 0, 1]
    assert shard.document(0) == range(2)


def test_megatrons_modes_after_the_boundaries_are_allowed(by_hand):
    by_hand.with_suffix(".idx").write_bytes(IDX + bytes(3))
    assert Shard(by_hand).num_documents == 2


@pytest.mark.parametrize(("code", "name", "width"), [(1, "u1", 1), (4, "<i4", 4), (5, "<i8", 8)])
def test_every_integer_type_of_megatron_is_read(by_hand, code, name, width):
    by_hand.with_suffix(".bin").write_bytes(np.array([5, 6, 7, 8, 9, 10]).astype(name).tobytes())
    offsets = struct.pack("<3q", 0, 3 * width, 4 * width)
    by_hand.with_suffix(".idx").write_bytes(IDX[:17] + bytes([code]) + IDX[18:46] + offsets + IDX[70:])
    assert Shard(by_hand).sequence(2).tolist() == [9, 10]


def test_a_vocabulary_beyond_65499_takes_four_bytes(tmp_path):
    for size, width in ((65499, 2), (65500, 4)):
        with Writer(tmp_path / "wide", vocab_size=size) as writer:
            writer.add(np.array([size - 1]))
        assert (tmp_path / "wide.bin").stat().st_size == width
        assert Shard(tmp_path / "wide").tokens(0, 1).tolist() == [size - 1]


def test_a_shard_without_documents_opens(tmp_path):
    with Writer(tmp_path / "empty", vocab_size=100):
        pass
    assert (Shard(tmp_path / "empty").num_tokens, Shard(tmp_path / "empty").num_documents) == (0, 0)


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (".bin", BIN[:-2], r"hand.bin holds 10 bytes, hand.idx promises 12: it is truncated.*copy it again or run megalite prepare"),
        (".bin", BIN + b"\0", "hand.bin holds 13 bytes, hand.idx promises 12"),
        (".idx", IDX[:-1], r"hand.idx holds 93 bytes, its header promises 94 \(3 sequences, 3 boundaries\): it is truncated"),
        (".idx", IDX[:20], "hand.idx holds 20 bytes, its header alone has 34"),
        (".idx", b"x" + IDX[1:], "it is no Megatron index"),
        (".idx", IDX[:9] + struct.pack("<Q", 2) + IDX[17:], "format version 2, this reads version 1"),
        (".idx", IDX[:17] + bytes([7]) + IDX[18:], "type code 7, tokens are integers"),
        (".idx", IDX[:46] + struct.pack("<3q", 0, 4, 8) + IDX[70:], "contradicts itself"),
        (".idx", IDX[:70] + struct.pack("<3q", 0, 2, 2), "contradicts itself"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_with_numbers_and_a_cure(by_hand, ending, content, message):
    by_hand.with_suffix(ending).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Shard(by_hand)


def test_a_missing_shard_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(
        UserError, match=rf"corpus.train.bin does not exist; make it: megalite prepare INPUT... --output {tmp_path}/corpus --tok"
    ):
        Shard(tmp_path / "corpus.train")


def test_an_unfinished_preparation_is_refused(by_hand):
    Path(f"{by_hand}.parts").mkdir()
    with pytest.raises(UserError, match="was not finished; run the same `megalite prepare` again"):
        Shard(by_hand)


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk"), Writer(tmp_path / "ours", vocab_size=100) as writer:
        writer.add(np.array([1, 2]))
        raise RuntimeError("disk")
    assert not list(tmp_path.iterdir())


def test_the_index_of_many_documents_is_right_beyond_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.shards.CHUNK", 7)
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 5, 100)
    tokens = rng.integers(0, 90, lengths.sum())
    with Writer(tmp_path / "many", vocab_size=100) as writer:
        writer.add(tokens, lengths=lengths, ends=np.arange(2, 102, 2))
    shard = Shard(tmp_path / "many")
    starts = np.cumsum([0, *lengths[:-1]])
    assert (shard.offsets == 2 * starts).all()
    assert (shard.boundaries == np.arange(0, 102, 2)).all()
    for token in range(shard.num_tokens):
        sequence = shard.sequence_at(token)
        assert starts[sequence] <= token < starts[sequence] + lengths[sequence]


def test_unigram_entropy_is_that_of_the_frequencies(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.shards.CHUNK", 3)
    with Writer(tmp_path / "e", vocab_size=100) as writer:
        writer.add(np.array([1, 1, 1, 1, 2, 2, 50, 50]))
    assert unigram_entropy(Shard(tmp_path / "e")) == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * math.log(4))
