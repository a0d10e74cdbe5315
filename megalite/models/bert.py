"""BERT as an ordered list of layers: token, position and segment embeddings, post-norm blocks, masked-token and next-sentence heads.

In: ids, segments, length, labels, next_sentence; out: the loss. Devlin et al. 2018, arXiv:1810.04805.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Model
from megalite.models.batch import Batch
from megalite.models.dropout import Dropout
from megalite.models.layers import Block, Projection, TokenLoss, norm, positions_of, token_loss

PLAN = {
    "embed.token": "vocabulary",
    "layers.*.attention.qkv": "column",
    "layers.*.attention.mix": "heads",
    "layers.*.attention.out": "row",
    "layers.*.mlp.up": "column",
    "layers.*.mlp.down": "row",
    "head.project": "projection",
    "head.loss": "vocabulary_loss",
}
TIED = {"head.project.weight": "embed.token.weight"}
PARTS = ("tokens", "pairs")  # what the loss is the sum of


class Embedding(nn.Module):
    """Token, position and segment embeddings and a norm: ids (b, s) and batch["segments"] (b, s) -> (b, s, d)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.vocab is not None
        self.token = nn.Embedding(model.vocab, model.width)
        self.position = nn.Embedding(model.sequence, model.width)
        self.segment = nn.Embedding(2, model.width)
        self.norm = norm(model)
        self.dropout = Dropout(model.dropout)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        x = self.token(ids)
        x = x + self.position(positions_of(x, batch)) + self.segment(batch["segments"])
        return self.dropout(self.norm(x), batch)


class Head(nn.Module):
    """Masked-token and next-sentence losses: (b, s, d) -> (2,), their weighted sums."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.vocab is not None
        self.transform = nn.Linear(model.width, model.width)
        self.norm = norm(model)
        self.project = Projection(model.width, model.vocab, bias=True)
        self.loss = TokenLoss(model.vocab)
        self.pool = nn.Linear(model.width, model.width)
        self.next_sentence = nn.Linear(model.width, 2)

    def logits(self, x: Tensor) -> Tensor:
        """Of every token: (b, s, d) -> (b, s, v)."""
        return self.project(self._transformed(x))

    def _transformed(self, x: Tensor) -> Tensor:
        return self.norm(F.gelu(self.transform(x)))

    def pair_logits(self, x: Tensor) -> Tensor:
        """Whether the second sentence follows the first (0) or was drawn at random (1): (b, s, d) -> (b, 2)."""
        return self.next_sentence(torch.tanh(self.pool(x[:, 0])))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        tokens = token_loss(self.project, self.loss, self._transformed(x), batch)
        pairs = F.cross_entropy(self.pair_logits(x).float(), batch["next_sentence"], reduction="none")
        return torch.stack([tokens, torch.dot(pairs, batch["pair_weights"].float())])


def layers(model: Model) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The model in order, as (name, builder)."""
    block = partial(Block, model, causal=False, norm_first=False)
    return [("embed", partial(Embedding, model)), *((f"layers.{n}", block) for n in range(model.layers)), ("head", partial(Head, model))]
