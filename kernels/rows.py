"""Triton kernels over rows of logits: what a cross-entropy needs of them, and its gradient in their place.

In: one piece of the logits, (n, c), the columns [first, first + c) of the vocabulary. Computed in fp32, each logit is read once a pass; the
online softmax is that of Milakov and Gimelshein 2018, arXiv:1805.02867. cross_entropy.py launches these and holds the same in PyTorch.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
COLUMNS, WARPS = 4096, 8  # a program's; held to no spills by tests/unit/kernels/test_compiled.py


@triton.jit
def measure(LOGITS, LABELS, STATS, number_rows, columns, logits_row, first, COLUMNS: tl.constexpr):
    """STATS (3, n): log-sum-exp, the logit of the label (0 where it is not in this piece), the sum of the logits. One program a row."""
    row = tl.program_id(0).to(tl.int64)
    logits = LOGITS + row * logits_row
    largest, powers, total = float("-inf"), 0.0, 0.0
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        top = tl.maximum(largest, tl.max(x, axis=0))
        powers = powers * tl.exp2((largest - top) * LOG2E) + tl.sum(tl.exp2((x - top) * LOG2E), axis=0)
        total += tl.sum(tl.where(column < columns, x, 0.0), axis=0)
        largest = top
    label = tl.load(LABELS + row) - first
    own = tl.load(logits + label, mask=(label >= 0) & (label < columns), other=0.0).to(tl.float32)
    tl.store(STATS + row, largest + tl.log2(powers) / LOG2E)
    tl.store(STATS + number_rows + row, own)
    tl.store(STATS + 2 * number_rows + row, total)


@triton.jit
def differentiate(LOGITS, LABELS, STATS, DSTATS, number_rows, columns, logits_row, first, COLUMNS: tl.constexpr):
    """Writes the gradient of every logit over it. STATS are those of all pieces, DSTATS (3, n) their gradients."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = LOGITS + row * logits_row + column
    x = tl.load(place, mask=column < columns, other=0.0).to(tl.float32)
    share = tl.exp2((x - tl.load(STATS + row)) * LOG2E)
    dlse, down, dtotal = tl.load(DSTATS + row), tl.load(DSTATS + number_rows + row), tl.load(DSTATS + 2 * number_rows + row)
    gradient = share * dlse + dtotal + tl.where(column == tl.load(LABELS + row) - first, down, 0.0)
    tl.store(place, gradient.to(LOGITS.dtype.element_ty), mask=column < columns)


def run_measure(logits: Tensor, labels: Tensor, first: int) -> Tensor:
    (n, c), stats = logits.shape, torch.empty((3, len(logits)), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        measure[(n,)](logits, labels, stats, n, c, logits.stride(0), first, COLUMNS=COLUMNS, num_warps=WARPS)
    return stats


def run_differentiate(logits: Tensor, labels: Tensor, stats: Tensor, dstats: Tensor, first: int) -> Tensor:
    n, c = logits.shape
    with torch.cuda.device_of(logits):
        differentiate[(n, triton.cdiv(c, COLUMNS))](
            logits, labels, stats, dstats, n, c, logits.stride(0), first, COLUMNS=COLUMNS, num_warps=WARPS
        )
    return logits
