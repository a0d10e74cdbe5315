"""Spans: the one idea of a mask. Row i of a sequence sees the keys [lo_i, hi_i), and both bounds never decrease from row to row.

That covers causal and bidirectional attention, padding, packed documents, sliding windows, prefixes and the shards of context
parallelism. A kernel needs four numbers a tile to know which tiles to skip and which to compute without a mask. In: what the mask means.
Out: `Spans`, 16 bytes a token, built on the device without asking it anything, and good for all layers of a batch. What no span can say
(a key in the middle that one row skips) needs another kernel.

Shapes: b batch, s query rows, n keys. FlashMask (Wang et al. 2024, arXiv:2410.01359) keeps bounds a column; here they are kept both ways.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FAR = 1 << 30  # further than any sequence is long, and small enough to add to a row in 32 bits


class Spans(NamedTuple):
    """Which keys a row sees and, the same said of keys, which rows see a key. int32, contiguous, on one device.

    A leading 1 serves every sequence of the batch alike. A row or a key with nothing has lo = hi.
    """

    lo: Tensor
    """(b or 1, s): the first key that row i sees"""
    hi: Tensor
    """(b or 1, s): one after the last key that row i sees"""
    first: Tensor
    """(b or 1, n): the first row that sees key j"""
    last: Tensor
    """(b or 1, n): one after the last row that sees key j"""

    def mask(self) -> Tensor:
        """(b or 1, s, n) bool, True where a row sees a key: for checking, and for kernels that know no spans."""
        keys = torch.arange(self.first.shape[1], device=self.lo.device)
        return (keys >= self.lo[..., None]) & (keys < self.hi[..., None])


def band(rows: int, keys: int, *, causal: bool, window: int | None = None) -> tuple[int, int]:
    """A mask that is the same for every sequence, as two numbers: row i sees the keys [i + low, i + high) that exist.

    With fewer rows than keys the last row stands at the last key. window counts the keys a row sees looking back, itself included
    (and as many looking ahead, where not causal).
    """
    here = keys - rows
    low = -FAR if window is None else here - window + 1
    high = here + 1 if causal else FAR if window is None else here + window
    return low, high


def bounded_spans(lo: Tensor, hi: Tensor, *, keys: int) -> Spans:
    """Spans from the bounds of every row, lo and hi (b or 1, s), which must never decrease along s. Rows with lo >= hi see nothing.

    A decreasing bound is a RuntimeError, at once on a CPU, and on a GPU when the device gets there (asking it would stop the host).
    """
    hi = hi.clamp(0, keys)
    lo = torch.minimum(lo.clamp(0, keys), hi)
    torch._assert_async(  # pyright: ignore[reportPrivateImportUsage] # on a GPU this waits for nobody
        (lo.diff(dim=-1) >= 0).all() & (hi.diff(dim=-1) >= 0).all(), "a span's bounds decrease from one row to the next; sort lo and hi"
    )
    every = torch.arange(keys, device=lo.device, dtype=lo.dtype).expand(lo.shape[0], keys).contiguous()
    first = torch.searchsorted(hi.contiguous(), every, right=True)  # rows before it end before this key
    last = torch.searchsorted(lo.contiguous(), every, right=True)  # rows from it on start after this key
    return Spans(*(t.to(torch.int32).contiguous() for t in (lo, hi, first, torch.maximum(first, last))))


def _banded(start: Tensor, stop: Tensor, *, keys: int, causal: bool, window: int | None) -> Spans:
    """The band, and of it what lies in [start, stop) of each row."""
    rows = start.shape[1]
    low, high = band(rows, keys, causal=causal, window=window)
    row = torch.arange(rows, device=start.device)
    return bounded_spans(torch.maximum(start, row + low), torch.minimum(stop, row + high), keys=keys)


def padding_spans(lengths: Tensor, *, rows: int, keys: int, causal: bool = False, window: int | None = None) -> Spans:
    """Keys from lengths[b] (b,) on are padding that no row sees."""
    stop = lengths.long()[:, None].expand(-1, rows)
    return _banded(torch.zeros_like(stop), stop, keys=keys, causal=causal, window=window)


def document_spans(documents: Tensor, *, causal: bool, window: int | None = None) -> Spans:
    """documents (b, s): the number of the document a token belongs to, never decreasing along s. A token sees its own document."""
    documents = documents.contiguous()
    start = torch.searchsorted(documents, documents)
    stop = torch.searchsorted(documents, documents, right=True)
    return _banded(start, stop, keys=documents.shape[1], causal=causal, window=window)


def packed_spans(cu_seqlens: Tensor, *, tokens: int, causal: bool, window: int | None = None) -> Spans:
    """Documents packed end to end: document d is the tokens [cu_seqlens[d], cu_seqlens[d + 1]). Tokens outside them see nothing."""
    ends = cu_seqlens.long().contiguous()
    place = torch.arange(tokens, device=ends.device)
    document = torch.searchsorted(ends, place, right=True)  # 0: before the first, len(ends): after the last
    bounds = torch.cat([ends[:1], ends, ends[-1:]])  # outside a document start = stop
    start, stop = bounds[document], bounds[document + 1]
    return _banded(start[None], stop[None], keys=tokens, causal=causal, window=window)


def prefix_spans(lengths: Tensor, *, tokens: int) -> Spans:
    """Every row sees the first lengths[b] (b,) tokens; beyond them attention is causal (Raffel et al. 2019, arXiv:1910.10683)."""
    row = torch.arange(tokens, device=lengths.device)
    hi = torch.maximum(lengths.long()[:, None], row + 1)
    return bounded_spans(torch.zeros_like(hi), hi, keys=tokens)


def shard(spans: Spans, *, rows: tuple[int, int], keys: tuple[int, int]) -> Spans:
    """The part of a mask between the rows [start, stop) and the keys [start, stop) that a rank of context parallelism holds."""
    (top, bottom), (left, right) = rows, keys
    lo, hi = ((t[:, top:bottom] - left).clamp(0, right - left).contiguous() for t in (spans.lo, spans.hi))
    first, last = ((t[:, left:right] - top).clamp(0, bottom - top).contiguous() for t in (spans.first, spans.last))
    return Spans(lo, hi, first, last)
