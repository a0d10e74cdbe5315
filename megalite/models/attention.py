"""`attend`: the one door to attention. Queries, keys and values in, mixed values out; PyTorch's SDPA does the work.

Shapes: b batch, s sequence, h query heads, g key-value heads, k head width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    lengths: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(k)) v with q (b, s, h, k), k and v (b, s, g, k), g dividing h; returns (b, s, h, k).

    causal: row i sees keys 0..i. lengths (b,): keys from lengths[b] on are padding that no row sees; lengths are at least 1. drop: what
    happens to the probabilities (b, h, s, s), which are kept in memory for it.
    """
    mask = None
    if lengths is not None:
        assert not causal, "padding is masked for bidirectional attention only"
        mask = (torch.arange(k.shape[1], device=k.device) < lengths[:, None])[:, None, None, :]  # (b, 1, 1, s)
    if drop is not None:
        return _attend_with_dropout(q, k, v, drop, mask=mask, causal=causal)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, is_causal=causal, enable_gqa=q.shape[2] != k.shape[2]
    )
    return mixed.transpose(1, 2)


def _attend_with_dropout(q: Tensor, k: Tensor, v: Tensor, drop: Callable[[Tensor], Tensor], *, mask: Tensor | None, causal: bool) -> Tensor:
    """Step by step, for SDPA draws from a generator of its own, which no other layout can repeat."""
    repeats = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    scores = torch.einsum("bihk,bjhk->bhij", q, k).float() * q.shape[-1] ** -0.5
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhij,bjhk->bihk", drop(scores.softmax(dim=-1)).to(v.dtype), v)


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of x (b, s, h, k), halves rotated as in Llama; fp32 inside."""
    half = x.shape[-1] // 2
    frequencies = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[:, None] * frequencies  # (s, k / 2)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]  # (s, 1, k / 2)
    first, second = x.float().split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
