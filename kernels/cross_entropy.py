"""Linear map to a vocabulary and cross-entropy in one. The logits are made a piece of the vocabulary at a time, used, and made again in the
backward pass; or, in one piece, kept until the backward pass puts their gradient over them.

What a token's loss needs of its v logits is three numbers, its *statistics*: their log-sum-exp, the logit of the label, and their sum.
Those of two pieces of the vocabulary combine into those of both, whether the pieces are made one after another or lie on several ranks. The
matrix products are PyTorch's; what is done to a piece in between is one Triton kernel (rows.py), or PyTorch where there is no GPU for it.

Pieces of the vocabulary and not of the tokens: so each piece of the weight's gradient is one product, and nothing is summed over pieces
in low precision but the input's gradient, n x d in fp32. Made again and not kept from the forward pass (Hsu et al. 2024, arXiv:2410.10989,
keep the gradient of the whole weight instead): a pipeline has many microbatches in flight, each of which would hold one.

Whatever the vocabulary, products are made with a multiple of 64 words, those that there are not having the weight 0: for others cuBLAS
(13.1) has kernels of an older kind alone, and the three products of GPT-2's 50257 words took five times as long (docs/benchmarks).

Shapes: n tokens, d width, v vocabulary (or this rank's part of it).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from .attention import DTYPES, why_not_triton

LSE, OWN, TOTAL = range(3)
UNIT = 64  # words
IGNORED = -100


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    pieces: int = 8,
) -> Tensor:
    """Losses (n,), fp32, of x (n, d) under logits x weight^T + bias; weight (v, d), bias (v,), labels (n,) int64.

    label_smoothing e: the target is 1 - e of the label and e of all words evenly (Szegedy et al. 2016). z_loss c: plus c lse^2, which keeps
    logits small (Chowdhery et al. 2022, arXiv:2204.02311). A label that is ignore_index has loss 0. `pieces`: 1 / pieces of the logits are
    in memory at a time. ValueError for input that cannot be computed.
    """
    if not 0 <= label_smoothing < 1 or not 0 <= z_loss < float("inf"):
        raise ValueError(f"label_smoothing = {label_smoothing}, z_loss = {z_loss}; give a share from 0 to 1, and a number from 0 on")
    statistics = linear_statistics(x, weight, bias, labels, pieces=pieces)
    lse, own, total = statistics.unbind()
    smooth = label_smoothing / len(weight)
    losses = lse - (1 - label_smoothing) * own - smooth * total + z_loss * lse.square()
    return losses.masked_fill(labels == ignore_index, 0.0)


def linear_statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    first: int = 0,
    pieces: int = 8,
    impl: Literal["auto", "triton", "reference"] = "auto",
) -> Tensor:
    """(3, n) fp32: log-sum-exp, logit of the label, sum, over the words [first, first + v) that `weight` (v, d) holds; it has gradients.

    A label outside of them has the logit 0 here: another rank has it. pieces = 1 keeps the logits, in x's precision, and goes back once.
    impl: auto is Triton where it runs and PyTorch elsewhere.
    Under autocast, x, weight and bias are cast to its dtype.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}: give (n, d), (v, d) and (n,)")
    if x.dtype != weight.dtype or x.dtype not in (*DTYPES, torch.float64) or labels.dtype != torch.int64:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}, labels {labels.dtype}; give one floating dtype, and int64 labels")
    if not 1 <= pieces <= len(weight):
        raise ValueError(f"pieces = {pieces} of {len(weight)} words; give 1 to {len(weight)}")
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"impl = {impl!r} is unknown; choose auto, triton or reference")
    reason = _why_not(x) if impl == "auto" else why_not_triton(x) if impl == "triton" else "reference"
    if impl == "triton" and reason:
        raise ValueError(f"impl = triton, but {reason}; use impl = auto or reference")
    labels = labels.contiguous()
    if pieces == 1:
        return _OnePiece.apply(x, weight, bias, labels, first, reason is None)  # type: ignore[return-value]
    return _Pieces.apply(x, weight, bias, labels, first, pieces, reason is None)  # type: ignore[return-value]


def _why_not(x: Tensor) -> str | None:
    from .selftest import why_not_rows

    return why_not_rows(x) if x.is_cuda else "no GPU"


def _cuts(v: int, pieces: int) -> list[tuple[int, int]]:
    """Begin and end of every piece, at multiples of UNIT where the vocabulary is large enough."""
    unit = UNIT if v >= pieces * UNIT else 1
    return list(pairwise([*(v * number // pieces // unit * unit for number in range(pieces)), v]))


def _measure(logits: Tensor, labels: Tensor, first: int, fused: bool) -> Tensor:
    if fused:
        from . import rows

        return rows.run_measure(logits, labels, first)
    exact = logits.to(_exact(logits.dtype))
    local = labels - first
    here = (local >= 0) & (local < logits.shape[1])
    own = exact.gather(1, local.where(here, 0)[:, None])[:, 0] * here
    return torch.stack([exact.logsumexp(1), own, exact.sum(1)])


def _differentiate(logits: Tensor, labels: Tensor, statistics: Tensor, given: Tensor, first: int, fused: bool) -> Tensor:
    """The gradient of the logits, which it may overwrite."""
    if fused:
        from . import rows

        return rows.run_differentiate(logits, labels, statistics, given, first)
    gradient = logits.to(_exact(logits.dtype)).sub(statistics[LSE, :, None]).exp_().mul_(given[LSE, :, None]).add_(given[TOTAL, :, None])
    local = labels - first
    here = (local >= 0) & (local < logits.shape[1])
    gradient.scatter_add_(1, local.where(here, 0)[:, None], (given[OWN] * here)[:, None])
    return gradient.to(logits.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padded(weight: Tensor, words: int) -> Tensor:
    """Of weight (v, d) or (v,), with zeros for more words; itself where there are enough."""
    return weight if len(weight) == words else torch.cat([weight, weight.new_zeros(words - len(weight), *weight.shape[1:])])


def _make_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (n, v) in aligned rows, and the padded weight, (w, d), that made them."""
    words = -(-len(weight) // UNIT) * UNIT
    wide = _padded(weight, words)
    logits = x @ wide.T if bias is None else torch.addmm(_padded(bias, words), x, wide.T)
    return logits[:, : len(weight)], wide


def _go_back_from(gradient: Tensor, x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (n, d) and weight (v, d) from that of logits (n, v), which lies where `_make_logits` made them, beside zeros."""
    whole = gradient.as_strided((len(gradient), len(wide)), gradient.stride())
    return whole @ wide, (whole.T @ x)[: gradient.shape[1]]


class _OnePiece(torch.autograd.Function):
    """(3, n), with the logits kept. The backward pass writes over them, so it can run once; autograd says so to whoever tries again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, fused: bool) -> Tensor:
        logits, _ = _make_logits(x, weight, bias)
        statistics = torch.ops.megalite.logit_statistics(logits, labels, first, fused)
        ctx.save_for_backward(logits, x, weight, labels, statistics)
        ctx.biased, ctx.first, ctx.fused = bias is not None, first, fused
        return statistics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, x, weight, labels, statistics = ctx.saved_tensors
        torch.ops.megalite.logit_gradient(logits, labels, statistics, grads[0].contiguous(), ctx.first, ctx.fused)
        dx, dweight = _go_back_from(logits, x, _padded(weight, logits.stride(0)))
        return dx, dweight, logits.sum(0) if ctx.biased else None, None, None, None


class _Pieces(torch.autograd.Function):
    """(3, n), with nothing kept of the logits: a piece of the vocabulary is let go before the next one is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, first: int, pieces: int, fused: bool) -> Tensor:
        found = None
        for start, stop in _cuts(len(weight), pieces):
            logits, wide = _make_logits(x, weight[start:stop], None if bias is None else bias[start:stop])
            piece = torch.ops.megalite.logit_statistics(logits, labels, first + start, fused)
            del logits, wide
            if found is None:
                found = piece
            else:
                found[LSE] = torch.logaddexp(found[LSE], piece[LSE])
                found[OWN:] += piece[OWN:]
        assert found is not None
        ctx.save_for_backward(found, x, weight, bias, labels)
        ctx.numbers = first, pieces, fused
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        statistics, x, weight, bias, labels = ctx.saved_tensors
        first, pieces, fused = ctx.numbers
        given = grads[0].contiguous()
        dx = torch.zeros(x.shape, dtype=_exact(x.dtype), device=x.device)
        dweight, dbias = torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        for start, stop in _cuts(len(weight), pieces):
            logits, wide = _make_logits(x, weight[start:stop], None if bias is None else bias[start:stop])
            torch.ops.megalite.logit_gradient(logits, labels, statistics, given, first + start, fused)
            if dbias is not None:
                dbias[start:stop] = logits.sum(0)
            part, dweight[start:stop] = _go_back_from(logits, x, wide)
            dx += part
            del logits, wide, part
        return dx.to(x.dtype), dweight, dbias, None, None, None, None


@torch.library.custom_op("megalite::logit_statistics", mutates_args=())
def _logit_statistics(logits: Tensor, labels: Tensor, first: int, fused: bool) -> Tensor:
    return _measure(logits, labels, first, fused)


@_logit_statistics.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((3, len(logits)), dtype=_exact(logits.dtype))


@torch.library.custom_op("megalite::logit_gradient", mutates_args=("logits",))
def _logit_gradient(logits: Tensor, labels: Tensor, statistics: Tensor, given: Tensor, first: int, fused: bool) -> None:
    """Over the logits."""
    gradient = _differentiate(logits, labels, statistics, given, first, fused)
    if gradient is not logits:
        logits.copy_(gradient)
