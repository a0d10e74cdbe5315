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
