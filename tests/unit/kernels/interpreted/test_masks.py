"""Every mask x heads x widths x precision x form of the backward pass, ragged lengths throughout, against fp64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megalite_kernels import attention
from megalite_kernels.spans import bounded_spans, document_spans, packed_spans, padding_spans, prefix_spans, shard
from oracle import grid, judge
from torch import Tensor

CU = torch.tensor([0, 31, 31, 33, 50, 66])  # an empty document, a tiny one, and 66 of the tokens there are
DOCUMENTS = torch.repeat_interleave(torch.arange(len(CU) - 1), CU.diff())


def _same(tokens: int) -> Tensor:
    """(tokens, tokens): both in one document."""
    number = torch.full((tokens,), -1)
    number[: len(DOCUMENTS)] = DOCUMENTS
    return (number[:, None] == number[None, :]) & (number[:, None] >= 0)


def _causal(rows: int, keys: int, window: int | None = None) -> Tensor:
    i, j = grid(rows, keys)
    i = i + keys - rows
    return (j <= i) & (j > i - (window or 10**6))


def _near(rows: int, keys: int, window: int) -> Tensor:
    i, j = grid(rows, keys)
    return (i + keys - rows - j).abs() < window


def _lengths(rows: int, keys: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([keys, 37])
    return lengths, (torch.arange(keys) < lengths[:, None])[:, None, :].expand(2, rows, keys)


def _prefix(tokens: int) -> tuple[Tensor, Tensor]:
    i, j = grid(tokens, tokens)
    lengths = torch.tensor([40, 5])
    return lengths, (j <= i) | (j < lengths[:, None, None])


def _gaps(rows: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows 20 to 39 see nothing; keys 10 to 29 are seen by nobody."""
    i, _ = grid(rows, keys)
    lo = torch.where(i < 20, 0, 30)[:, 0]
    hi = torch.where(i < 20, 10, torch.where(i < 40, 30, keys))[:, 0]
    _, j = grid(rows, keys)
    return lo[None], hi[None], (j >= lo[:, None]) & (j < hi[:, None])


def _shard(rows: tuple[int, int], keys: tuple[int, int]) -> tuple[Any, Tensor]:
    whole = packed_spans(CU, tokens=70, causal=True)
    mask = (_same(70) & _causal(70, 70))[rows[0] : rows[1], keys[0] : keys[1]]
    return shard(whole, rows=rows, keys=keys), mask


# name -> (rows, keys, options of attention, boolean mask (b or 1, s, n)); packed: q is (t, h, k)
# One row is tried in eight sequences: the error of one is a lottery, in which plain PyTorch may happen to hit the number.
CASES: dict[str, Callable[[], tuple[int, int, dict[str, Any], Tensor]]] = {
    "all": lambda: (70, 93, {}, torch.ones(1, 70, 93, dtype=torch.bool)),
    "causal": lambda: (66, 66, {"causal": True}, _causal(66, 66)[None]),
    "causal, more keys": lambda: (40, 66, {"causal": True}, _causal(40, 66)[None]),
    "causal, more rows": lambda: (66, 40, {"causal": True}, _causal(66, 40)[None]),
    "causal window": lambda: (97, 97, {"causal": True, "window": 17}, _causal(97, 97, 17)[None]),
    "window": lambda: (66, 66, {"window": 9}, _near(66, 66, 9)[None]),
    "one row": lambda: (1, 70, {"causal": True}, torch.ones(8, 1, 70, dtype=torch.bool)),
    "padding": lambda: (70, 93, {"key_lengths": _lengths(70, 93)[0]}, _lengths(70, 93)[1]),
    "padding, causal": lambda: (93, 93, {"key_lengths": _lengths(93, 93)[0], "causal": True}, _lengths(93, 93)[1] & _causal(93, 93)),
    "padding as spans": lambda: (70, 93, {"spans": padding_spans(_lengths(70, 93)[0], rows=70, keys=93)}, _lengths(70, 93)[1]),
    "prefix": lambda: (93, 93, {"spans": prefix_spans(_prefix(93)[0], tokens=93)}, _prefix(93)[1]),
    "documents": lambda: (66, 66, {"spans": document_spans(DOCUMENTS[None], causal=True)}, (_same(66) & _causal(66, 66))[None]),
    "gaps": lambda: (70, 93, {"spans": bounded_spans(*_gaps(70, 93)[:2], keys=93)}, _gaps(70, 93)[2][None]),
    "shard above": lambda: (30, 36, {"spans": _shard((40, 70), (0, 36))[0]}, _shard((40, 70), (0, 36))[1][None]),
    "shard within": lambda: (45, 45, {"spans": _shard((20, 65), (20, 65))[0]}, _shard((20, 65), (20, 65))[1][None]),
    "packed causal": lambda: (70, 70, {"cu_seqlens": CU, "causal": True}, (_same(70) & _causal(70, 70))[None]),
    "packed": lambda: (70, 70, {"cu_seqlens": CU}, _same(70)[None]),
    "packed causal window": lambda: (
        70,
        70,
        {"cu_seqlens": CU, "causal": True, "window": 11},
        (_same(70) & _causal(70, 70, 11))[None],
    ),
}
SHAPES = [  # query heads, key-value heads, head width, precision
    (1, 1, 64, torch.float32),
    (4, 2, 32, torch.float32),
    (2, 1, 80, torch.float32),
    (1, 1, 128, torch.float16),
    (3, 1, 64, torch.float16),
]


def _cases() -> list:
    """Every mask with every shape in both forms; one in eight of them is quick, and one in four is not slow."""
    cases = []
    for turn, ((row, case), form, shape) in enumerate(itertools.product(enumerate(CASES), (False, True), SHAPES)):
        name = f"{case}-{shape[0]}of{shape[1]}x{shape[2]}-{str(shape[3])[6:]}-{'deterministic' if form else 'fast'}"
        marks = () if turn % 8 == row % 8 else (pytest.mark.long,) if turn % 4 == row % 4 else (pytest.mark.slow,)
        cases.append(pytest.param(case, shape, form, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(("case", "shape", "deterministic"), _cases())
def test_the_kernels_are_as_right_as_pytorch(case: str, shape: tuple[int, int, int, torch.dtype], deterministic: bool) -> None:
    rows, keys, options, mask = CASES[case]()
    heads, kv_heads, width, dtype = shape
    packed, batch = "cu_seqlens" in options, len(mask)
    torch.manual_seed(len(case) + heads)
    inputs = [torch.randn(batch, s, h, width, dtype=dtype) for s, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads))]

    def kernel(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (t[0] for t in tensors) if packed else tensors
        out, lse = attention(q, k, v, **options, deterministic=deterministic, return_lse=True, impl="triton")
        return (out[None], lse[None]) if packed else (out, lse)

    judge(kernel, inputs, mask, options={"scale": width**-0.5})
