"""GPT samples: windows over the flat token stream of a shard (Radford et al. 2019).

In: a `Shard`. Out: window k = tokens [k*s, k*s + s + 1) as {"ids": (s,), "labels": (s,)}, int64, each label the next token. Windows
cross document boundaries; the eos token at the end of a document is the mark. Opening reads nothing and builds no index.

With a document mask, a window is cut after every eos: "documents": (s,) numbers the pieces from 0, attention and positions keep to them,
and an eos predicts nothing (label -100), as what follows it belongs to another document.
"""

from __future__ import annotations

import numpy as np

from megalite.data.manifest import prepare_line
from megalite.data.shards import Shard
from megalite.errors import UserError


class Causal:
    """Window k of a shard, the same in every epoch."""

    def __init__(self, shard: Shard, *, sequence: int, vocab_size: int, eos: int | None = None) -> None:
        """eos: the token that ends a document, where windows are to be cut after it."""
        self.shard, self.length, self.vocab_size, self.eos = shard, sequence, vocab_size, eos
        if len(self) < 1:
            raise UserError(
                f"shard {shard.prefix} holds {shard.num_tokens} tokens, one sample needs data.sequence + 1 = {sequence + 1}; "
                "lower data.sequence or prepare more text"
            )
        if eos is not None and (ends := shard.sequence(int(shard.boundaries[1]) - 1))[-1:].tolist() != [eos]:
            raise UserError(
                f"data.document_mask cuts after the tokenizer's end-of-text token {eos}, but the first document of {shard.prefix} ends "
                f"with {ends[-1:].tolist()}; prepare it again with {prepare_line(shard.prefix)}, or leave data.document_mask out"
            )

    def __len__(self) -> int:
        return (self.shard.num_tokens - 1) // self.length

    def sample(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        start = index * self.length
        window = self.shard.tokens(start, start + self.length + 1).astype(np.int64)
        check_ids(window, shard=self.shard, vocab_size=self.vocab_size)
        ids, labels = window[:-1], window[1:]
        if self.eos is None:
            return {"ids": ids, "labels": labels}
        ends = ids == self.eos
        return {"ids": ids, "labels": np.where(ends, -100, labels), "documents": np.cumsum(ends) - ends}


def check_ids(ids: np.ndarray, *, shard: Shard, vocab_size: int) -> None:
    """Files from elsewhere name no tokenizer; an id beyond the vocabulary would read foreign memory on a GPU."""
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise UserError(
            f"shard {shard.prefix} holds token id {int(ids.max())}, the vocabulary has {vocab_size}; "
            "set data.tokenizer to the tokenizer of the shard, or raise model.vocab"
        )
