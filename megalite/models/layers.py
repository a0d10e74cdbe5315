"""The parts both families are made of: norms, fused projections, attention, MLP, token loss. Plain PyTorch, knows no rank.

A layer never asks how many heads or columns it holds: it infers them from its own weights, so `parallel/tensor.py` can cut the
weights from outside. Every layer of a model is called `layer(x, batch)`; x is the hidden state (b, s, d), `batch` the microbatch.
"""

from __future__ import annotations

import torch
from megalite_kernels import draws, linear_statistics  # pyright: ignore[reportMissingImports]
from megalite_kernels.selftest import why_not_rows  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Model
from megalite.models.attention import attend, positions_in, rotate
from megalite.models.batch import Batch
from megalite.models.dropout import Dropout


def positions_of(x: Tensor, batch: Batch) -> Tensor:
    """Where the tokens of x (b, s, ...) stand: batch["positions"] (b, s), or in their documents, or 0 .. s - 1."""
    if "positions" in batch:
        return batch["positions"]
    return positions_in(batch["documents"]) if "documents" in batch else torch.arange(x.shape[1], device=x.device)


def norm(model: Model) -> nn.Module:
    if model.norm == "rms":
        return nn.RMSNorm(model.width, eps=model.norm_eps)
    return nn.LayerNorm(model.width, eps=model.norm_eps)


class Fused(nn.Linear):
    """Several linear maps of the same input in one weight, stacked along the output; `sections` are their widths."""

    def __init__(self, width: int, sections: tuple[int, ...], *, bias: bool) -> None:
        super().__init__(width, sum(sections), bias=bias)
        self.sections = sections


class Mix(nn.Module):
    """What attention does between whole sequences, without weights: q (b, s, h, k), k and v (b, s, g, k) -> (b, s, h, k).

    Any heads of the model will do. Where they are cut into equal parts, `part` says which of them these are: dropout tells them apart.
    """

    def __init__(self, model: Model, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.dropout = causal, model.attention_dropout
        self.rope_base = model.rope_base if model.positions == "rope" else None
        self.part, self.site = 0, 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        documents = batch.get("documents")
        if self.rope_base is not None:
            positions = None if documents is None else positions_in(documents)
            q, k = rotate(q, self.rope_base, positions), rotate(k, self.rope_base, positions)
        dropout = None
        if self.dropout and "samples" in batch:
            heads = torch.arange(self.part * q.shape[2], (self.part + 1) * q.shape[2], device=q.device)
            dropout = self.dropout, draws(batch["samples"], heads, q.shape[1], site=self.site)
        lengths = None if self.causal else batch["length"]
        return attend(q, k, v, causal=self.causal, lengths=lengths, documents=documents, spans=batch.get("spans"), dropout=dropout)


class Attention(nn.Module):
    """Self-attention with grouped-query heads: (b, s, d) -> (b, s, d)."""

    def __init__(self, model: Model, *, causal: bool) -> None:
        super().__init__()
        self.head_width, self.queries_per_key = model.head_width, model.heads // model.num_kv_heads
        query, key = model.heads * model.head_width, model.num_kv_heads * model.head_width
        self.qkv = Fused(model.width, (query, key, key), bias=model.has_qkv_bias)
        self.mix = Mix(model, causal=causal)
        self.out = nn.Linear(query, model.width, bias=model.bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))  # (b, s, h + 2 g, k), as many heads as this weight holds
        keys = heads.shape[2] // (self.queries_per_key + 2)
        q, k, v = heads.split([keys * self.queries_per_key, keys, keys], dim=2)
        return self.out(self.mix(q, k, v, batch).flatten(2))


class Mlp(nn.Module):
    """Two-layer perceptron, gated (SwiGLU, Shazeer 2020, arXiv:2002.05202) or GELU: (b, s, d) -> (b, s, d)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.activation = model.activation
        sections = (model.mlp_width,) * (2 if model.activation == "swiglu" else 1)
        self.up = Fused(model.width, sections, bias=model.bias)
        self.down = nn.Linear(model.mlp_width, model.width, bias=model.bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)  # (b, s, f), twice as wide when gated
        if self.activation == "swiglu":
            gate, value = up.chunk(2, dim=-1)
            return self.down(F.silu(gate) * value)
        return self.down(F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class Block(nn.Module):
    """A transformer block: norm before each half (GPT) or after it (BERT)."""

    def __init__(self, model: Model, *, causal: bool, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention, self.mlp = Attention(model, causal=causal), Mlp(model)
        self.attention_norm, self.mlp_norm = norm(model), norm(model)
        self.attention_dropout, self.mlp_dropout = Dropout(model.dropout), Dropout(model.dropout)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.norm_first:
            x = self.attention_dropout(self.attention(self.attention_norm(x), batch), batch, x)
            return self.mlp_dropout(self.mlp(self.mlp_norm(x)), batch, x)
        x = self.attention_norm(self.attention_dropout(self.attention(x, batch), batch, x))
        return self.mlp_norm(self.mlp_dropout(self.mlp(x), batch, x))


class Projection(nn.Linear):
    """To the vocabulary: (b, s, d) -> logits (b, s, v); or, given labels (b, s), what the loss needs of the logits, (3, b s).

    That is made in `pieces` of the vocabulary, so no more than 1 / pieces of the logits is ever in memory; one piece is kept for the
    backward pass. See `megalite_kernels`.
    """

    pieces = 1

    def forward(self, input: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(input)
        return linear_statistics(input.flatten(0, 1), self.weight, self.bias, labels.flatten(), pieces=self.pieces)


class TokenLoss(nn.Module):
    """Weighted cross-entropy over the vocabulary: logits (b, s, v), labels (b, s), weights (b, s) -> a sum, shape ().

    Positions of weight 0 add nothing, whatever their label. Computed in fp32.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(logits.float().flatten(0, 1), labels.clamp(min=0).flatten(), reduction="none")
        return torch.dot(losses, weights.flatten().float())

    def of_statistics(self, statistics: Tensor, weights: Tensor) -> Tensor:
        """The same from a `Projection`'s statistics (3, b s): log-sum-exp, the label's logit, the sum of the logits."""
        return torch.dot(statistics[0] - statistics[1], weights.flatten().float())


def token_loss(project: nn.Module, loss: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    """The weighted sum of the losses of x (b, s, d), which the head has normalised: a `Projection` and a `TokenLoss`, cut or not.

    On a GPU through the fused kernels, elsewhere, unless in pieces, through PyTorch's.
    """
    if project.pieces == 1 and not has_fused_loss(x):
        return loss(project(x), batch["labels"], batch["weights"])
    return loss.of_statistics(project(x, batch["labels"]), batch["weights"])  # type: ignore[operator]


def has_fused_loss(x: Tensor) -> bool:
    """Whether the kernels take what the loss needs from the logits of a hidden state like x."""
    return x.is_cuda and why_not_rows(x) is None


def split_vocabulary(layer: nn.Module, pieces: int) -> None:
    """Have the head's loss, if `layer` is one, made in so many pieces of the vocabulary."""
    for module in layer.modules():
        if hasattr(module, "pieces"):
            module.pieces = pieces  # type: ignore[assignment]
