"""GPT as an ordered list of layers: GPT-2 (learned positions, LayerNorm, GELU, biases, tied) or Llama-style (RoPE, RMSNorm, SwiGLU,
grouped-query heads), by config. In: token ids and labels; out: the loss.

GPT-2: Radford et al. 2019. Llama: Touvron et al. 2023, arXiv:2302.13971.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megalite.config import Model
from megalite.models.batch import Batch
from megalite.models.dropout import Dropout
from megalite.models.layers import Block, Projection, TokenLoss, norm, positions_of, token_loss

PLAN = {  # how tensor parallelism may cut these modules; what is not named here is held whole by every rank
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
PARTS = ("tokens",)  # what the loss is the sum of


class Embedding(nn.Module):
    """Token (and learned position) embeddings: ids (b, s) -> (b, s, d)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.vocab is not None
        self.token = nn.Embedding(model.vocab, model.width)
        self.position = nn.Embedding(model.sequence, model.width) if model.positions == "learned" else None
        self.dropout = Dropout(model.dropout)

    def forward(self, ids: Tensor, batch: Batch) -> Tensor:
        x = self.token(ids)
        if self.position is not None:
            x = x + self.position(positions_of(x, batch))
        return self.dropout(x, batch)


class Head(nn.Module):
    """Final norm, projection to the vocabulary, loss: (b, s, d) -> (1,), the weighted sum of the token losses."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        assert model.vocab is not None
        self.norm = norm(model)
        self.project = Projection(model.width, model.vocab, bias=False)
        self.loss = TokenLoss(model.vocab)

    def logits(self, x: Tensor) -> Tensor:
        """(b, s, d) -> (b, s, v)."""
        return self.project(self.norm(x))

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        return token_loss(self.project, self.loss, self.norm(x), batch).reshape(1)


def layers(model: Model) -> list[tuple[str, Callable[[], nn.Module]]]:
    """The model in order, as (name, builder). One device runs all of it; a pipeline stage builds and runs its slice."""
    block = partial(Block, model, causal=True, norm_first=True)
    return [("embed", partial(Embedding, model)), *((f"layers.{n}", block) for n in range(model.layers)), ("head", partial(Head, model))]
