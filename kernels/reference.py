"""Attention written out in plain PyTorch: what the kernels are held to, and what runs where no kernel does.

In: queries, keys, values and a boolean mask. Out: mixed values and the log of the softmax's denominator. Scores of every row and key are
kept, b h s n numbers, so this is for checking and for small inputs. Gradients come from autograd.

Shapes: b batch, s query rows, n keys, h query heads, g key-value heads, k head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .randomness import Draws, kept


def attend_exactly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    dropout: tuple[float, Draws] | None = None,
) -> tuple[Tensor, Tensor]:
    """q (b, s, h, k), k and v (b, n, g, k), mask (b or 1, s, n) -> out (b, s, h, k) in q's dtype, lse (b, h, s).

    Computed in fp32, or in fp64 where q is fp64; lse comes in the same. sink (h,) is one more score a head that takes weight and gives
    no value; dropout is its probability and its draws. A row that sees nothing gives 0, and -inf (or its sink) as lse.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    queries, keys, values = (t.to(exact).transpose(1, 2) for t in (q, k, v))  # (b, h, s, k)
    keys, values = (t.repeat_interleave(group, dim=1) for t in (keys, values))
    scores = queries @ keys.transpose(-1, -2) * scale  # (b, h, s, n)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, None], float("-inf"))
    top = scores.detach().amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], float("-inf"))  # (b, h, s)
    if sink is not None:
        top = torch.maximum(top, sink.detach().to(exact)[:, None])
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top[..., None])
    total = weights.sum(-1)
    if sink is not None:
        total = total + torch.exp(sink.to(exact)[:, None] - top)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, float("-inf"))
    weights = weights / total[..., None]
    if dropout is not None:
        probability, draws = dropout
        weights = weights * kept(draws, dropout_p=probability) / (1 - probability)
    return (weights @ values).transpose(1, 2).to(q.dtype).contiguous(), lse
