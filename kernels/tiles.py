"""What the attention kernels share, in Triton: the bounds of a tile, its loads, the soft cap, the draws of dropout.

A tile is a block of rows times a block of keys. Both kinds of mask give the same bounds: a band by arithmetic, spans by loading.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from . import randomness

LOG2E = tl.constexpr(1.4426950408889634)
NOWHERE = tl.constexpr(1 << 30)
SCRAMBLE_0, SCRAMBLE_1 = tl.constexpr(randomness.SCRAMBLE[0]), tl.constexpr(randomness.SCRAMBLE[1])


@triton.jit
def read_bounds(BEGIN, END, low, high, at, limit, SPANS: tl.constexpr):
    """[begin, end) of the rows (or keys) `at`, an int32 vector of places that exist; empty ones have begin >= end."""
    if SPANS:
        begin = tl.load(BEGIN + at)
        end = tl.load(END + at)
    else:
        begin = tl.maximum(at + low, 0)
        end = tl.minimum(at + high, limit)
    return begin, end


@triton.jit
def tile_range(BEGIN, END, low, high, first, count, limit, SIDE: tl.constexpr, TILE: tl.constexpr, SPANS: tl.constexpr):
    """For the SIDE rows (or keys) from `first` on, of `count`: where the loop over the other side starts (on a multiple of TILE) and ends,
    and the part of it that all of them see. Bounds never decrease, so the ends of the block say it all: four scalars.
    """
    final = tl.minimum(first + SIDE, count) - 1
    start, whole_stop = read_bounds(BEGIN, END, low, high, first, limit, SPANS)
    whole_start, stop = read_bounds(BEGIN, END, low, high, final, limit, SPANS)
    return start // TILE * TILE, stop, whole_start, whole_stop


@triton.jit
def load_tile(
    X, first, base, column, stride, limit, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """(TILE, BLOCK) from row `first` on. X is a pointer at row 0 of this sequence and head, or the descriptor of all rows and heads.

    A descriptor's tile may run into the next sequence: what is read there is masked like any row beyond the end.
    """
    if DESCRIPTOR:
        x = X.load([base + first, column])
    else:
        inside = tl.arange(0, TILE)
        across = tl.arange(0, BLOCK)
        place = X + first.to(tl.int64) * stride + inside[:, None] * stride + across[None, :]
        mask = (inside < limit - first)[:, None]
        if BLOCK != WIDTH:
            mask = mask & (across < WIDTH)[None, :]
        x = tl.load(place, mask=mask, other=0.0)
    return x


@triton.jit
def store_tile(X, x, first, stride, limit, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    inside = tl.arange(0, TILE)
    across = tl.arange(0, BLOCK)
    mask = (inside < limit - first)[:, None]
    if BLOCK != WIDTH:
        mask = mask & (across < WIDTH)[None, :]
    tl.store(X + first.to(tl.int64) * stride + inside[:, None] * stride + across[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit
def add_tile(X, x, first, stride, limit, TILE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    inside = tl.arange(0, TILE)
    across = tl.arange(0, BLOCK)
    mask = (inside < limit - first)[:, None]
    if BLOCK != WIDTH:
        mask = mask & (across < WIDTH)[None, :]
    tl.atomic_add(X + first.to(tl.int64) * stride + inside[:, None] * stride + across[None, :], x, mask=mask, sem="relaxed")


@triton.jit
def tanh(x):
    """By exp2, which every target has, and odd, so that its rounding (1e-7) does not add up to one side."""
    small = tl.math.exp2(tl.abs(x) * LOG2E * -2.0)
    magnitude = (1.0 - small) / (1.0 + small)
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def kept(row_numbers, key_numbers, limit):
    """Which draws keep their weight; the two are shaped to broadcast."""
    x = (row_numbers ^ key_numbers).to(tl.uint32, bitcast=True)
    x = (x ^ (x >> 16)) * SCRAMBLE_0
    x = (x ^ (x >> 15)) * SCRAMBLE_1
    x = x ^ (x >> 16)
    return (x >> 1).to(tl.int32) >= limit
