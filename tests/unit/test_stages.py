"""Layers to stages: every layer once and in order, no stage empty, and no other cut has a cheaper dearest stage."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.config import Config
from megalite.models import counts
from megalite.parallel.stages import assign

COSTS = st.lists(st.integers(0, 20), min_size=1, max_size=9)


def _loads(costs: list, ranges: list[range]) -> list:
    return [sum(costs[layer] for layer in found) for found in ranges]


def _every_cut(costs: list, num: int) -> list[list[range]]:
    """All ways to make `num` non-empty contiguous ranges."""
    cuts = itertools.combinations(range(1, len(costs)), num - 1)
    return [[range(a, b) for a, b in itertools.pairwise((0, *inner, len(costs)))] for inner in cuts]


@given(costs=COSTS, data=st.data())
def test_stages_are_contiguous_not_empty_and_hold_every_layer_once(costs: list[int], data: st.DataObject) -> None:
    num = data.draw(st.integers(1, len(costs)))
    ranges = assign(costs, num)
    assert len(ranges) == num and all(ranges)
    assert [layer for found in ranges for layer in found] == list(range(len(costs)))


@given(costs=COSTS, data=st.data())
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], data: st.DataObject) -> None:
    num = data.draw(st.integers(1, len(costs)))
    best = min(max(_loads(costs, ranges)) for ranges in _every_cut(costs, num))
    assert max(_loads(costs, assign(costs, num))) == best


def test_of_equally_good_cuts_the_most_even_is_taken() -> None:
    """The dear layer decides the dearest stage; the other four are still shared out, two and two."""
    assert _loads([1, 1, 1, 1, 9], assign([1, 1, 1, 1, 9], 3)) == [2, 2, 9]
    assert _loads([9, 1, 1, 1, 1], assign([9, 1, 1, 1, 1], 3)) == [9, 2, 2]


@pytest.mark.parametrize(("layers", "num", "sizes"), [(4, 4, [1, 1, 1, 1]), (6, 3, [2, 2, 2]), (7, 1, [7])])
def test_equal_layers_are_shared_out_equally(layers: int, num: int, sizes: list[int]) -> None:
    assert [len(found) for found in assign([1.0] * layers, num)] == sizes


def test_layers_that_do_not_divide_leave_no_stage_with_two_more_than_another() -> None:
    for layers, num in itertools.product(range(1, 12), range(1, 6)):
        if num <= layers:
            sizes = [len(found) for found in assign([1.0] * layers, num)]
            assert max(sizes) == -(-layers // num)


def test_more_stages_than_layers_are_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="2 layers cannot make 3 stages"):
        assign([1.0, 1.0], 3)


def test_a_dear_head_gets_fewer_blocks_beside_it() -> None:
    """A large vocabulary makes the last stage dear; the optimum over all cuts of a real model is met."""
    model = Config.model_validate({"model": {"layers": 6, "width": 64, "heads": 4, "vocab": 4000, "sequence": 32}}).model
    costs = counts.layer_costs(model, 32)
    ranges = assign(costs, 3)
    assert len(ranges[-1]) < len(ranges[0])
    assert max(_loads(costs, ranges)) == min(max(_loads(costs, other)) for other in _every_cut(costs, 3))
