"""The parts both families are made of: norms, fused projections, attention, MLP, token loss. Plain PyTorch, knows no rank.

A layer never asks how many heads or columns it holds: it infers them from its own weights, so `parallel/tensor.py` can cut the
weights from outside. Every layer of a model is called `layer(x, batch)`; x is the hidden state (b, s, d), `batch` the microbatch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalite.config import Model
from megalite.models.attention import attend, rotate

Batch = dict[str, Tensor]


def norm(model: Model) -> nn.Module:
    if model.norm == "rms":
        return nn.RMSNorm(model.width, eps=model.norm_eps)
    return nn.LayerNorm(model.width, eps=model.norm_eps)


class Fused(nn.Linear):
    """Several linear maps of the same input in one weight, stacked along the output; `sections` are their widths."""

    def __init__(self, width: int, sections: tuple[int, ...], *, bias: bool) -> None:
        super().__init__(width, sum(sections), bias=bias)
        self.sections = sections


class Attention(nn.Module):
    """Self-attention with grouped-query heads: (b, s, d) -> (b, s, d)."""

    def __init__(self, model: Model, *, causal: bool) -> None:
        super().__init__()
        self.causal, self.head_width, self.queries_per_key = causal, model.head_width, model.heads // model.num_kv_heads
        self.rope_base = model.rope_base if model.positions == "rope" else None
        query, key = model.heads * model.head_width, model.num_kv_heads * model.head_width
        self.qkv = Fused(model.width, (query, key, key), bias=model.bias)
        self.out = nn.Linear(query, model.width, bias=model.bias)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_width))  # (b, s, h + 2 g, k), as many heads as this weight holds
        keys = heads.shape[2] // (self.queries_per_key + 2)
        q, k, v = heads.split([keys * self.queries_per_key, keys, keys], dim=2)
        if self.rope_base is not None:
            q, k = (rotate(t, self.rope_base, batch.get("positions")) for t in (q, k))
        mixed = attend(
            q, k, v, causal=self.causal, lengths=None if self.causal else batch["length"], documents=batch.get("documents"), memo=batch
        )
        return self.out(mixed.flatten(2))


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

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        if self.norm_first:
            x = x + self.attention(self.attention_norm(x), batch)
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.attention(x, batch))
        return self.mlp_norm(x + self.mlp(x))


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
