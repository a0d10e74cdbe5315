"""Spans say the same from the rows' side and from the keys' side, and what their definition says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megalite_kernels.spans import Spans, band, bounded_spans, document_spans, packed_spans, padding_spans, prefix_spans, shard


def _of_keys(spans: Spans) -> torch.Tensor:
    """The mask by what the keys say."""
    rows = torch.arange(spans.lo.shape[1])[:, None]
    return (rows >= spans.first[:, None, :]) & (rows < spans.last[:, None, :])


@st.composite
def _bounds(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    keys = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 12))
    many = st.lists(st.integers(-3, keys + 3), min_size=rows, max_size=rows)
    return sorted(draw(many)), sorted(draw(many)), keys


@given(_bounds())
def test_rows_and_keys_tell_the_same_mask(bounds: tuple[list[int], list[int], int]) -> None:
    lo, hi, keys = bounds
    spans = bounded_spans(torch.tensor([lo]), torch.tensor([hi]), keys=keys)
    expected = torch.tensor([[low <= j < high for j in range(keys)] for low, high in zip(lo, hi, strict=True)])
    assert torch.equal(spans.mask()[0], expected)
    assert torch.equal(_of_keys(spans)[0], expected)
    assert all((bound.diff(dim=-1) >= 0).all() and bound.dtype == torch.int32 and bound.is_contiguous() for bound in spans)


@given(_bounds(), st.data())
def test_a_shard_is_the_part_of_the_mask(bounds: tuple[list[int], list[int], int], data: st.DataObject) -> None:
    lo, hi, keys = bounds
    spans = bounded_spans(torch.tensor([lo]), torch.tensor([hi]), keys=keys)
    cut = lambda n: tuple(sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))))  # noqa: E731
    (top, bottom), (left, right) = cut(len(lo)), cut(keys)
    part = shard(spans, rows=(top, bottom), keys=(left, right))
    expected = spans.mask()[:, top:bottom, left:right]
    assert torch.equal(part.mask(), expected) and torch.equal(_of_keys(part), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_documents_by_number_and_by_length_are_the_same(causal: bool, window: int | None) -> None:
    numbers = torch.tensor([[0, 0, 0, 1, 4, 4, 4, 4, 9, 9]])
    by_number = document_spans(numbers, causal=causal, window=window)
    by_length = packed_spans(torch.tensor([0, 3, 4, 4, 8, 10]), tokens=10, causal=causal, window=window)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_number, by_length, strict=True))
    i, j = torch.arange(10)[:, None], torch.arange(10)[None]
    expected = numbers[0][:, None] == numbers[0][None]
    expected &= (j <= i) | (not causal)
    expected &= ((i - j).abs() < window) if window else torch.ones(10, 10, dtype=torch.bool)
    assert torch.equal(by_number.mask()[0], expected)


def test_padding_and_prefix() -> None:
    padding = padding_spans(torch.tensor([2, 5]), rows=3, keys=5)
    assert padding.mask()[0].tolist() == [[True, True, False, False, False]] * 3 and padding.mask()[1].all()
    prefix = prefix_spans(torch.tensor([3]), tokens=4)
    assert prefix.mask()[0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_band_stands_at_the_last_key() -> None:
    assert band(2, 5, causal=True) == (-(1 << 30), 4)  # row 0 sees 4 keys, row 1 all 5
    assert band(5, 5, causal=True, window=2) == (-1, 1)
    assert band(5, 5, causal=False, window=2) == (-1, 2)


def test_bounds_that_fall_are_refused() -> None:
    with pytest.raises(RuntimeError, match="bounds decrease"):
        bounded_spans(torch.tensor([[2, 1]]), torch.tensor([[3, 3]]), keys=4)
