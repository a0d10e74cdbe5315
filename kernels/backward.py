"""The backward kernels.

`by_keys`: a program takes a block of keys and walks the rows that see them, for the gradients of keys and values and, in the fast form, of
the queries too: five products a tile, and the queries' are summed by atomic addition, so that last bits may differ from run to run.
`by_rows`: a program takes a block of rows and walks their keys, for the gradient of the queries. `by_keys` without atomics and `by_rows`
together are the deterministic form, seven products. `prepare` gives each row what both need. Dao 2023, arXiv:2307.08691.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportReturnType=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E, add_tile, kept, load_tile, read_bounds, store_tile, tanh, tile_range


@triton.jit(do_not_specialize=["rows"])
def prepare(
    OUT, DOUT, LSE, DLSE, STATS, rows, stats_row,
    out_batch, out_row, out_head, dout_batch, dout_row, dout_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, DLSES: tl.constexpr,
):  # fmt: skip
    """STATS (b h, 2, stats_row) fp32: lse, and sum(out * dout) less the gradient of lse, which every score of the row loses.

    lse is +inf where a row sees nothing, so that its weights are exp2(-inf) = 0.
    """
    row, h, b = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    head = b * HEADS + h
    at = row + tl.arange(0, ROWS)
    inside = at < rows
    out = load_tile(OUT + b.to(tl.int64) * out_batch + h * out_head, row, 0, 0, out_row, rows, ROWS, WIDTH, BLOCK, False)
    dout = load_tile(DOUT + b.to(tl.int64) * dout_batch + h * dout_head, row, 0, 0, dout_row, rows, ROWS, WIDTH, BLOCK, False)
    lost = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    place = head.to(tl.int64) * rows + at
    if DLSES:
        lost -= tl.load(DLSE + place, mask=inside, other=0.0) * LOG2E
    lse = tl.load(LSE + place, mask=inside, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    to = STATS + head.to(tl.int64) * 2 * stats_row + at
    tl.store(to, lse)
    tl.store(to + stats_row, tl.where(inside, lost, 0.0))


@triton.jit(do_not_specialize=["rows", "keys", "low", "high", "drop_limit"])
def by_keys(
    Q, K, V, DOUT, DQ, DK, DV, STATS, FIRST, LAST, NUMBERS,
    inner, factor, slope, keep_share, low, high, rows, keys, span_stride, drop_limit, number_rows, number_keys, stats_row,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPANS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """DK and DV (b, n, g, k contiguous) of KEYS keys of one key-value head; with FUSED, adds to DQ (b, s, h, k contiguous, fp32, unscaled).

    slope is what a score's gradient is multiplied by to be one of q k. Grid: tiles of keys, key-value heads, batch.
    """
    kv_heads: tl.constexpr = HEADS // GROUP
    key, g, b = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    if not DESCRIPTOR:
        K += b.to(tl.int64) * k_batch + g * k_head
        V += b.to(tl.int64) * v_batch + g * v_head
    if SPANS:
        FIRST += b * span_stride
        LAST += b * span_stride
    at = key + tl.arange(0, KEYS)
    first, last = read_bounds(FIRST, LAST, 1 - high, 1 - low, tl.minimum(at, keys - 1), rows, SPANS)
    last = tl.where(at < keys, last, 0)  # keys beyond the end, or the next sequence's, are seen by nobody
    start, stop, whole_start, whole_stop = tile_range(FIRST, LAST, 1 - high, 1 - low, key, keys, rows, KEYS, ROWS, SPANS)
    if key + KEYS > keys:
        whole_stop = 0
    k = load_tile(K, key, b * keys, g * WIDTH, k_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
    v = load_tile(V, key, b * keys, g * WIDTH, v_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
    dk = tl.zeros([KEYS, BLOCK], tl.float32)
    dv = tl.zeros([KEYS, BLOCK], tl.float32)
    for h in range(g * GROUP, g * GROUP + GROUP):
        head = b * HEADS + h
        queries, douts = Q, DOUT
        if not DESCRIPTOR:
            queries += b.to(tl.int64) * q_batch + h * q_head
            douts += b.to(tl.int64) * dout_batch + h * dout_head
        stats = STATS + head.to(tl.int64) * 2 * stats_row
        if DROPOUT:
            drawn = NUMBERS + head.to(tl.int64) * (number_rows + number_keys)
            key_numbers = tl.load(drawn + number_rows + at)
        # hoisting what does not change out of the loop costs registers, and at width 128 ptxas would spill
        for row in tl.range(start, stop, ROWS, disable_licm=True):
            row = tl.multiple_of(row, ROWS)
            i = row + tl.arange(0, ROWS)
            q = load_tile(queries, row, b * rows, h * WIDTH, q_row, rows, ROWS, WIDTH, BLOCK, DESCRIPTOR)
            dout = load_tile(douts, row, b * rows, h * WIDTH, dout_row, rows, ROWS, WIDTH, BLOCK, DESCRIPTOR)
            lse = tl.load(stats + i)  # rows are padded to whole tiles
            lost = tl.load(stats + stats_row + i)
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # (KEYS, ROWS): everything here lies on its side
            if SOFTCAP:
                scores = tanh(scores * inner)
            weights = tl.math.exp2(scores * factor - lse[None, :])
            if (row < whole_start) | (row + ROWS > whole_stop):
                weights = tl.where((i[None, :] >= first[:, None]) & (i[None, :] < last[:, None]), weights, 0.0)
            if DROPOUT:
                keep = kept(tl.load(drawn + i)[None, :], key_numbers[:, None], drop_limit)
                given = tl.where(keep, weights / keep_share, 0.0)
                dv = tl.dot(given.to(dout.dtype), dout, dv, input_precision="ieee")
                dweights = tl.dot(v, tl.trans(dout), input_precision="ieee")
                dweights = tl.where(keep, dweights / keep_share, 0.0) - lost[None, :]
            else:  # the product starts from -lost: 16 registers fewer, without which ptxas spills at width 128
                dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision="ieee")
                dweights = tl.dot(v, tl.trans(dout), tl.broadcast_to(-lost[None, :], (KEYS, ROWS)), input_precision="ieee")
            dscores = weights * dweights
            if SOFTCAP:
                dscores = dscores * (1.0 - scores * scores)
            dscores = dscores.to(q.dtype)
            dk = tl.dot(dscores, q, dk, input_precision="ieee")
            if FUSED:
                dq = tl.dot(tl.trans(dscores), k, input_precision="ieee")
                if DESCRIPTOR:  # rows beyond the end add 0 to the next sequence
                    DQ.atomic_add([b * rows + row, h * WIDTH], dq)
                else:
                    add_tile(DQ + b.to(tl.int64) * rows * (HEADS * WIDTH) + h * WIDTH, dq, row, HEADS * WIDTH, rows, ROWS, WIDTH, BLOCK)
    to = b.to(tl.int64) * keys * (kv_heads * WIDTH) + g * WIDTH
    store_tile(DV + to, dv, key, kv_heads * WIDTH, keys, KEYS, WIDTH, BLOCK)
    store_tile(DK + to, dk * slope, key, kv_heads * WIDTH, keys, KEYS, WIDTH, BLOCK)


@triton.jit(do_not_specialize=["rows", "keys", "low", "high", "drop_limit"])
def by_rows(
    Q, K, V, DOUT, DQ, STATS, LO, HI, NUMBERS,
    inner, factor, slope, keep_share, low, high, rows, keys, span_stride, drop_limit, number_rows, number_keys, stats_row,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SPANS: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """DQ (b, s, h, k contiguous) of ROWS rows of one head, summed in the order of the keys. Grid as in the forward kernel."""
    row, h, b = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS, tl.program_id(1), tl.program_id(2)
    head, g = b * HEADS + h, h // GROUP
    if not DESCRIPTOR:
        Q += b.to(tl.int64) * q_batch + h * q_head
        K += b.to(tl.int64) * k_batch + g * k_head
        V += b.to(tl.int64) * v_batch + g * v_head
        DOUT += b.to(tl.int64) * dout_batch + h * dout_head
    if SPANS:
        LO += b * span_stride
        HI += b * span_stride
    at = row + tl.arange(0, ROWS)
    lo, hi = read_bounds(LO, HI, low, high, tl.minimum(at, rows - 1), keys, SPANS)
    start, stop, whole_start, whole_stop = tile_range(LO, HI, low, high, row, rows, keys, ROWS, KEYS, SPANS)
    q = load_tile(Q, row, b * rows, h * WIDTH, q_row, rows, ROWS, WIDTH, BLOCK, DESCRIPTOR)
    dout = load_tile(DOUT, row, b * rows, h * WIDTH, dout_row, rows, ROWS, WIDTH, BLOCK, DESCRIPTOR)
    stats = STATS + head.to(tl.int64) * 2 * stats_row + at
    lse = tl.load(stats)
    lost = tl.load(stats + stats_row)
    if DROPOUT:
        NUMBERS += head.to(tl.int64) * (number_rows + number_keys)
        row_numbers = tl.load(NUMBERS + at)
    dq = tl.zeros([ROWS, BLOCK], tl.float32)
    for key in tl.range(start, stop, KEYS):
        key = tl.multiple_of(key, KEYS)
        k = load_tile(K, key, b * keys, g * WIDTH, k_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
        v = load_tile(V, key, b * keys, g * WIDTH, v_row, keys, KEYS, WIDTH, BLOCK, DESCRIPTOR)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            scores = tanh(scores * inner)
        weights = tl.math.exp2(scores * factor - lse[:, None])
        j = key + tl.arange(0, KEYS)
        if (key < whole_start) | (key + KEYS > whole_stop):
            weights = tl.where((j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None]), weights, 0.0)
        dweights = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = kept(row_numbers[:, None], tl.load(NUMBERS + number_rows + j)[None, :], drop_limit)
            dweights = tl.where(keep, dweights / keep_share, 0.0)
        dscores = weights * (dweights - lost[:, None])
        if SOFTCAP:
            dscores = dscores * (1.0 - scores * scores)
        dq = tl.dot(dscores.to(k.dtype), k, dq, input_precision="ieee")
    to = b.to(tl.int64) * rows * (HEADS * WIDTH) + h * WIDTH
    store_tile(DQ + to, dq * slope, row, HEADS * WIDTH, rows, ROWS, WIDTH, BLOCK)
