"""GPT windows."""

from __future__ import annotations

import numpy as np
import pytest

from megalite.data.causal import Causal
from megalite.data.shards import Shard, Writer
from megalite.errors import UserError


@pytest.fixture
def shard(tmp_path) -> Shard:
    with Writer(tmp_path / "count", vocab_size=200) as writer:
        for start in (0, 40, 41):
            writer.add(np.arange(start, {0: 40, 40: 41, 41: 101}[start]))
    return Shard(tmp_path / "count")


def test_window_k_begins_at_token_k_times_s_and_labels_are_the_next_tokens(shard):
    windows = Causal(shard, sequence=10, vocab_size=200)
    assert len(windows) == 10
    for k in range(10):
        sample = windows.sample(k, epoch=3)
        assert sample["ids"].tolist() == list(range(10 * k, 10 * k + 10))
        assert sample["labels"].tolist() == list(range(10 * k + 1, 10 * k + 11))
        assert sample["ids"].dtype == sample["labels"].dtype == np.int64


def test_the_last_label_needs_a_token_of_its_own(shard):
    assert len(Causal(shard, sequence=100, vocab_size=200)) == 1
    with pytest.raises(
        UserError, match=r"holds 101 tokens, one sample needs data.sequence \+ 1 = 102; lower data.sequence or prepare more text"
    ):
        Causal(shard, sequence=101, vocab_size=200)


def test_an_id_beyond_the_vocabulary_is_refused(shard):
    windows = Causal(shard, sequence=10, vocab_size=100)
    windows.sample(8, 0)
    with pytest.raises(
        UserError, match=r"holds token id 100, the vocabulary has 100; set data.tokenizer to the tokenizer of the shard, or raise"
    ):
        windows.sample(9, 0)


def test_a_document_mask_cuts_after_every_end_of_text_and_predicts_nothing_from_it(tmp_path):
    with Writer(tmp_path / "ends", vocab_size=50) as writer:
        for document in ([5, 6, 7, 0], [0], [8, 9, 0], [10, 11, 12, 0]):
            writer.add(np.array(document))
    windows = Causal(Shard(tmp_path / "ends"), sequence=10, vocab_size=50, eos=0)
    sample = windows.sample(0, epoch=0)
    assert sample["ids"].tolist() == [5, 6, 7, 0, 0, 8, 9, 0, 10, 11]
    assert sample["documents"].tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3]
    assert sample["labels"].tolist() == [6, 7, 0, -100, -100, 9, 0, -100, 11, 12]
    assert {value.dtype for value in sample.values()} == {np.dtype(np.int64)}


def test_a_document_mask_needs_documents_that_end_with_the_token(shard):
    with pytest.raises(UserError, match=r"end-of-text token 7, but the first document of .*count ends with \[39\]; prepare it again"):
        Causal(shard, sequence=10, vocab_size=200, eos=7)
