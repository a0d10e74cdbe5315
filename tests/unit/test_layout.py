"""A cut and the rectangles of its flat ranges say of every element where it lies: each global element once, none lost, none twice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.layout import Cut, Rectangle, split


def _numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor in which every element is its own flat index."""
    return torch.arange(math.prod(shape)).view(shape)


def _brute_take(cut: Cut) -> torch.Tensor:
    """The local shard of the numbered tensor, found by walking its rows one by one."""
    full = _numbered(cut.shape)
    if cut.dim is None:
        return full
    kept, base = [], 0
    for part in cut.parts:
        owner = [rank for rank in range(cut.num) for _ in range(part // cut.num + (rank < part % cut.num))]
        kept += [base + row for row in range(part) if owner[row] == cut.index]
        base += part
    return full.index_select(cut.dim, torch.tensor(kept, dtype=torch.int64))


def _read(cut: Cut, rectangle: Rectangle) -> torch.Tensor:
    """What a rectangle covers of the numbered global tensor, flattened row by row."""
    full = _numbered(cut.shape)
    for dim, (offset, size) in enumerate(zip(rectangle.offsets, rectangle.sizes, strict=True)):
        full = full.narrow(dim, offset, size)
    return full.flatten()


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], int | None, tuple[int, ...], int]:
    """A shape of up to four dims, the dim that is cut (or none), sections along it, the number of ranks."""
    shape = list(draw(st.lists(st.integers(1, 6), max_size=4)))
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    sections: list[int] = []
    if dim is not None:
        sections = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        shape[dim] = sum(sections)
    return tuple(shape), dim, tuple(sections), draw(st.integers(1, 4))


@given(size=st.integers(0, 50), num=st.integers(1, 9))
def test_parts_add_up_and_differ_by_at_most_one(size: int, num: int) -> None:
    parts = split(size, num)
    assert (sum(parts), len(parts)) == (size, num)
    assert max(parts) - min(parts) <= 1 and parts == sorted(parts, reverse=True)


@given(tensors())
def test_a_rank_takes_the_rows_that_counting_one_by_one_gives_it(tensor: tuple) -> None:
    shape, dim, sections, num = tensor
    for index in range(num):
        cut = Cut("w", shape, dim, sections, index=index, num=num)
        taken = cut.take(_numbered(shape))
        assert torch.equal(taken, _brute_take(cut))
        assert tuple(taken.shape) == cut.local_shape


@given(tensors())
def test_what_all_ranks_took_and_put_back_is_the_tensor(tensor: tuple) -> None:
    shape, dim, sections, num = tensor
    full, again = _numbered(shape), torch.full(shape, -1)
    for index in range(num):
        cut = Cut("w", shape, dim, sections, index=index, num=num)
        cut.put(cut.take(full), again)
    assert torch.equal(again, full)


@settings(deadline=None, max_examples=300)
@given(tensor=tensors(), dp=st.integers(1, 5))
@example(tensor=((2, 8), 1, (4, 4), 2), dp=1)  # two rows that cross two sections: four blocks, in the order of the shard
def test_the_ranges_of_all_ranks_tile_the_global_tensor_once(tensor: tuple, dp: int) -> None:
    """Cut by tensor parallelism, then flat by ZeRO, as checkpoints are written."""
    shape, dim, sections, num = tensor
    seen = torch.zeros(shape, dtype=torch.int64)
    for index in range(num):
        cut = Cut("w", shape, dim, sections, index=index, num=num)
        local = _brute_take(cut).flatten()
        length = -(-len(local) // dp)
        for rank in range(dp):
            start, stop = min(rank * length, len(local)), min((rank + 1) * length, len(local))
            at = start
            for rectangle in cut.rectangles(start, stop):
                assert rectangle.start == at, "the rectangles do not follow one another in the range"
                at = rectangle.stop
                assert torch.equal(_read(cut, rectangle), local[rectangle.start : rectangle.stop])
                seen.view(-1)[_read(cut, rectangle)] += 1
            assert at == stop, "the rectangles do not fill the range"
    tensor_parallel_copies = num if dim is None else 1  # every rank holds the whole of an uncut tensor
    assert (seen == tensor_parallel_copies).all(), "an element was written twice or not at all"


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 7), max_size=4), data=st.data())
def test_any_range_of_an_uncut_tensor_is_at_most_2n_minus_1_blocks(shape: list[int], data: st.DataObject) -> None:
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    cut = Cut("w", tuple(shape))
    found = cut.rectangles(start, stop)
    assert len(found) <= max(1, 2 * len(shape) - 1)
    assert [int(i) for r in found for i in _read(cut, r)] == list(range(start, stop))


def test_a_range_in_the_middle_needs_all_2n_minus_1_blocks() -> None:
    assert len(Cut("w", (4, 4, 4)).rectangles(21, 59)) == 5  # 3 + 8 | 16 | 8 + 3


@settings(deadline=None)
@given(tensor=tensors(), data=st.data())
def test_a_shard_of_one_section_needs_no_more_blocks_than_an_uncut_tensor(tensor: tuple, data: st.DataObject) -> None:
    shape, dim, sections, num = tensor
    if dim is None:
        return
    shape = (*shape[:dim], sum(sections), *shape[dim + 1 :])
    cut = Cut("w", shape, dim, index=data.draw(st.integers(0, num - 1)), num=num)
    size = math.prod(cut.local_shape)
    start = data.draw(st.integers(0, size))
    assert len(cut.rectangles(start, data.draw(st.integers(start, size)))) <= 2 * len(shape) - 1


def test_a_fused_weight_keeps_its_part_of_every_section() -> None:
    """Query, key and value of 4, 2 and 2 rows on two ranks: rank 1 holds the second half of each."""
    cut = Cut("qkv", (8, 3), 0, (4, 2, 2), index=1, num=2)
    assert cut.sections() == [(2, 2), (5, 1), (7, 1)]
    assert cut.take(_numbered((8, 3)))[:, 0].tolist() == [6, 9, 15, 21]
    assert cut.rectangles(0, 12) == [
        Rectangle((2, 0), (2, 3), 0, 6),
        Rectangle((5, 0), (1, 3), 6, 9),
        Rectangle((7, 0), (1, 3), 9, 12),
    ]


def test_a_row_cut_is_one_block_where_whole_rows_are_meant() -> None:
    cut = Cut("w", (3, 4), 1, index=1, num=2)
    assert cut.rectangles(0, 6) == [Rectangle((0, 2), (3, 2), 0, 6)]
    assert cut.rectangles(1, 3) == [Rectangle((0, 3), (1, 1), 1, 2), Rectangle((1, 2), (1, 1), 2, 3)]


def test_a_scalar_and_a_single_element_are_one_block() -> None:
    assert Cut("scale", ()).rectangles(0, 1) == [Rectangle((), (), 0, 1)]
    assert Cut("scale", ()).local_shape == ()
    for ndim in range(1, 5):
        one = (1,) * ndim
        assert Cut("one", one).rectangles(0, 1) == [Rectangle((0,) * ndim, one, 0, 1)]
        assert Cut("one", one, 0, index=0, num=2).rectangles(0, 1) == [Rectangle((0,) * ndim, one, 0, 1)]


@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_an_empty_range_has_no_block(shape: tuple[int, ...]) -> None:
    assert Cut("w", shape).rectangles(0, 0) == []


def test_more_ranks_than_rows_leave_the_last_ranks_empty_handed() -> None:
    cuts = [Cut("w", (2, 3), 0, index=index, num=4) for index in range(4)]
    assert [cut.local_shape for cut in cuts] == [(1, 3), (1, 3), (0, 3), (0, 3)]
    assert cuts[3].rectangles(0, 0) == []
    again = torch.zeros(2, 3, dtype=torch.int64)
    for cut in cuts:
        cut.put(cut.take(_numbered((2, 3))), again)
    assert torch.equal(again, _numbered((2, 3)))


def test_one_rank_takes_a_view_and_no_copy() -> None:
    full = torch.zeros(4, 4)
    assert Cut("w", (4, 4), 0).take(full).data_ptr() == full.data_ptr()


def test_sections_that_do_not_add_up_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match=r"qkv: sections \(4, 2\) do not add up to 8"):
        Cut("qkv", (8, 3), 0, (4, 2))


def test_every_small_matrix_on_every_small_mesh_is_tiled_once() -> None:
    """What hypothesis samples, exhaustively for matrices: dims, ranks and flat parts up to 3."""
    for rows, cols, dim, num, dp in itertools.product(range(1, 4), range(1, 4), (0, 1), range(1, 4), range(1, 4)):
        seen = torch.zeros(rows * cols, dtype=torch.int64)
        for index in range(num):
            cut = Cut("w", (rows, cols), dim, index=index, num=num)
            size = math.prod(cut.local_shape)
            bounds = [size * rank // dp for rank in range(dp + 1)]
            for start, stop in itertools.pairwise(bounds):
                for rectangle in cut.rectangles(start, stop):
                    seen[_read(cut, rectangle)] += 1
        assert (seen == 1).all(), (rows, cols, dim, num, dp)
