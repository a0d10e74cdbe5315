"""The forward kernel: one program takes a block of rows of one head and walks the keys they see, with an online softmax.

Per tile: scores, the running maximum, weights, one product with the values. Tiles nobody sees are never visited; tiles that every row sees
skip the mask (a branch that is the same for all threads). Dao 2023, arXiv:2307.08691.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E, kept, load_tile, read_bounds, store_tile, tanh, tile_range

LOWEST = tl.constexpr(-1e30)  # a running maximum that is finite, so that a row with nothing to see yet makes no NaN


@triton.jit(do_not_specialize=["rows", "keys", "low", "high", "drop_limit"])
def attend(
    Q, K, V, OUT, LSE, LO, HI, SINK, NUMBERS,
    inner, factor, keep_share,  # scores are factor * f(inner * q k) in base 2, f the identity or tanh; keep_share: 1 - dropout
    low, high, rows, keys, span_stride, drop_limit, number_rows, number_keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPANS: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """OUT and LSE (in base 2, as it is used) of ROWS rows of one head.

    Grid: tiles of rows, heads, batch; the longest rows of a causal mask come first.
    """
    row, h, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS, tl.program_id(1), tl.program_id(2)
    head, g = b * HEADS + h, h // GROUP
    if not DESCRIPTOR:
        Q += b.to(tl.int64) * q_batch + h * q_head
        K += b.to(tl.int64) * k_batch + g * k_head
        V += b.to(tl.int64) * v_batch + g * v_head
    OUT += b.to(tl.int64) * out_batch + h * out_head
    if SPANS:
        LO += b * span_stride
        HI += b * span_stride
    at = row + tl.arange(0, ROWS)
    lo, hi = read_bounds(LO, HI, low, high, tl.minimum(at, rows - 1), keys, SPANS)
    start, stop, whole_start, whole_stop = tile_range(LO, HI, low, high, row, rows, keys, ROWS, KEYS, SPANS)
    q = load_tile(Q, row, b * rows, h * WIDTH, q_row, rows, ROWS, WIDTH, BLOCK, DESCRIPTOR)
    if DROPOUT:
        NUMBERS += head.to(tl.int64) * (number_rows + number_keys)
        row_numbers = tl.load(NUMBERS + at)
    top = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    for key in tl.range(start, stop, KEYS):
        key = tl.multiple_of(key, KEYS)
        k = load_tile(K, key, b * keys, g * WIDTH, k_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * inner)
        if (key < whole_start) | (key + KEYS > whole_stop):
            j = key + tl.arange(0, KEYS)
            scores = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.math.exp2(scores * factor - higher[:, None])
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None]
        if DROPOUT:
            key_numbers = tl.load(NUMBERS + number_rows + key + tl.arange(0, KEYS))
            weights = tl.where(kept(row_numbers[:, None], key_numbers[None, :], drop_limit), weights, 0.0)
        v = load_tile(V, key, b * keys, g * WIDTH, v_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
        out = tl.dot(weights.to(v.dtype), v, out, input_precision="ieee")
        top = higher
    if SINKS:
        sink = tl.load(SINK + h).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        shrink = tl.math.exp2(top - higher)
        total = total * shrink + tl.math.exp2(sink - higher)
        out = out * shrink[:, None]
        top = higher
    seen = total > 0.0
    whole = tl.where(seen, total, 1.0)
    tl.store(LSE + head.to(tl.int64) * rows + at, tl.where(seen, top + tl.math.log2(whole), float("-inf")), mask=at < rows)
    if DROPOUT:
        whole = whole * keep_share
    store_tile(OUT, out / whole[:, None], row, out_row, rows, ROWS, WIDTH, BLOCK)
