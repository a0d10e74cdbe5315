"""A model's sizes, as numbers or as arrays of many models, and what a layer of it weighs and computes once tensor parallelism has cut it.

In: `config.Model`, or columns of a table of runs.  Out: parameters, FLOPs and stage costs, vectorised; `models/counts.py` is the same for
one model, and a test holds the two together. Plain arithmetic: numpy and no torch, so that a layout is judged in a second.

Symbols: s sequence, d width, h query heads, g key-value heads, k head width, f MLP width, v vocabulary, t tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.config import Config

Number = Any  # an int, a float, or an array of them that broadcasts with the layouts


def ceil(size: Number, num: Number) -> Number:
    """The largest of `num` parts of `size`."""
    return -(-size // num)


@dataclass(frozen=True)
class Shape:
    """What the closed form needs to know of a model and its samples."""

    layers: Number
    width: Number
    heads: Number
    kv_heads: Number
    mlp: Number
    vocab: Number
    sequence: Number
    gated: Number  # SwiGLU: the first MLP matrix is twice as wide
    tied: Number  # the head shares the embedding's weight
    bias: Number
    learned: Number  # positions: a table of model.sequence rows
    rms: Number  # norms without a bias
    bert: Number = False
    positions: Number = 0  # rows of that table
    rope: Number = False
    dropout: Number = False  # behind attention, the MLP and the embedding
    attention_dropout: Number = False
    documents: Number = False  # samples are packed from several, and kept apart
    pieces: int = 1  # of the vocabulary, that the loss is made in

    @classmethod
    def of(cls, config: Config) -> Shape:
        """The shape of a run; its vocabulary must be known."""
        model = config.model
        assert model.vocab is not None, "the vocabulary is known once the tokenizer is"
        return cls(
            layers=model.layers,
            width=model.width,
            heads=model.heads,
            kv_heads=model.num_kv_heads,
            mlp=model.mlp_width,
            vocab=model.vocab,
            sequence=config.sequence,
            gated=model.activation == "swiglu",
            tied=model.tied,
            bias=model.bias,
            learned=model.positions == "learned",
            rms=model.norm == "rms",
            bert=model.family == "bert",
            positions=model.sequence if model.positions == "learned" else 0,
            rope=model.positions == "rope",
            dropout=model.dropout > 0,
            attention_dropout=model.attention_dropout > 0,
            documents=config.data.document_mask,
            pieces=config.train.loss_pieces,
        )

    def take(self, rows: Any) -> Shape:
        """Of several models some; of one, that one."""
        return Shape(**{name: value[rows] if np.ndim(value) else value for name, value in vars(self).items()})

    @property
    def head_width(self) -> Number:
        return self.width // self.heads

    @property
    def ups(self) -> Number:
        """Widths f that the first MLP matrix has side by side."""
        return np.where(self.gated, 2, 1)

    @property
    def norm(self) -> Number:
        return self.width * np.where(self.rms, 1, 2)

    def columns(self, t: Number) -> Number:
        """Columns of the fused query, key and value on a rank."""
        return (ceil(self.heads, t) + 2 * ceil(self.kv_heads, t)) * self.head_width

    def block_cut(self, t: Number) -> Number:
        """Parameters of a block that tensor parallelism cuts, on a rank."""
        d, f, bias = self.width, ceil(self.mlp, t), np.where(self.bias, 1, 0)
        up = f * self.ups
        return self.columns(t) * (d + bias) + ceil(self.heads, t) * self.head_width * d + up * (d + bias) + f * d

    @property
    def block_whole(self) -> Number:
        """Parameters of a block that every rank holds: two norms, and the biases behind the two sums."""
        return 2 * self.norm + np.where(self.bias, 2, 0) * self.width

    def embed_cut(self, t: Number) -> Number:
        return ceil(self.vocab, t) * self.width

    @property
    def embed_whole(self) -> Number:
        return self.positions * self.width + np.where(self.bert, 2 * self.width + self.norm, 0)

    def head_cut(self, t: Number) -> Number:
        """The projection to the vocabulary: its weight (also where it is tied: see `parameters`), BERT's bias."""
        return ceil(self.vocab, t) * (self.width + np.where(self.bert, 1, 0))

    @property
    def head_whole(self) -> Number:
        d = self.width
        return self.norm + np.where(self.bert, 2 * (d * d + d) + 2 * d + 2, 0)

    def parameters(self, t: Number = 1) -> Number:
        """Of the whole model on a rank that holds all stages, a tied weight counted once."""
        blocks = self.layers * (self.block_cut(t) + self.block_whole)
        tied = np.where(self.tied, self.vocab_weight(t), 0)
        return blocks + self.embed_cut(t) + self.embed_whole + self.head_cut(t) + self.head_whole - tied

    def vocab_weight(self, t: Number = 1) -> Number:
        return ceil(self.vocab, t) * self.width

    def block_flops(self) -> Number:
        """Forward FLOPs of a block for one sequence, all s x s scores; see counts.layer_costs."""
        s, d, k = self.sequence, self.width, self.head_width
        projections = 2 * s * d * (self.heads + 2 * self.kv_heads) * k + 2 * s * self.heads * k * d
        return projections + 4.0 * s * s * self.heads * k + 2.0 * (self.ups + 1) * s * d * self.mlp

    def head_flops(self) -> Number:
        s, d = self.sequence, self.width
        return 2.0 * s * d * self.vocab + np.where(self.bert, 2.0 * s * d * d + 2 * d * d + 4 * d, 0)

    def step_flops(self, num_sequences: Number) -> Number:
        """Model FLOPs of an optimizer step: forward, and a backward pass of twice as much."""
        return 3.0 * num_sequences * (self.layers * self.block_flops() + self.head_flops())
