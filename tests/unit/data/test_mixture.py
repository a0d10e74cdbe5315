"""The order of samples: a bijection an epoch, exact shares at any time, nothing remembered."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.mixture import Blend, InOrder, Mixture, permute

KEYS = st.lists(st.integers(0, 2**70), min_size=1, max_size=3)


class Numbers:
    """A data set whose sample says which one it is."""

    def __init__(self, name: int, size: int) -> None:
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        assert 0 <= index < self.size
        return {"ids": np.array([self.name, index, epoch])}


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 600), KEYS)
def test_a_permutation_meets_every_place_once(size, key):
    assert sorted(permute(i, size=size, key=key) for i in range(size)) == list(range(size))


def test_a_permutation_shuffles():
    size = 1000
    places = np.array([[permute(i, size=size, key=(seed,)) for i in range(size)] for seed in range(20)])
    assert abs(np.mean([np.corrcoef(np.arange(size), row)[0, 1] for row in places])) < 4 / (20 * size) ** 0.5
    steps = np.diff(places, axis=1) % size  # neighbours land anywhere: no stride is preferred
    assert np.bincount(steps.ravel(), minlength=size).max() < 20 + 6 * 20**0.5
    assert len({tuple(row) for row in places}) == 20


def test_small_sizes_reach_all_permutations():
    found = Counter(tuple(permute(i, size=4, key=(seed,)) for i in range(4)) for seed in range(600))
    assert len(found) == 24
    assert max(found.values()) < 25 + 6 * 5


def test_permutations_work_far_beyond_memory():
    size = 10**15
    places = {permute(i, size=size, key=(1,)) for i in range(1000)}
    assert len(places) == 1000
    assert size * 0.4 < np.mean([float(p) for p in places]) < size * 0.6


@settings(deadline=None, max_examples=80)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12))
def test_a_blend_keeps_every_share_within_two_samples(weights):
    blend, counts, total = Blend(weights), [0] * len(weights), sum(weights)
    for number in range(400):
        which, before = blend.locate(number)
        assert before == counts[which]
        counts[which] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - (number + 1) * weight / total) <= 2


def test_a_blend_is_exact_after_a_trillion():
    blend = Blend([3, 1])
    start = 10**12
    assert [blend.locate(start + i)[0] for i in range(8)].count(0) == 6
    which, before = blend.locate(start)
    assert abs(before - start * (0.75 if which == 0 else 0.25)) <= 2


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 10)), min_size=1, max_size=4), st.integers(0, 2**40))
def test_every_sample_is_seen_once_an_epoch(sets, seed):
    mixture = Mixture([Numbers(i, size) for i, (size, _) in enumerate(sets)], weights=[weight for _, weight in sets], seed=seed)
    seen = Counter(mixture.locate(n) for n in range(300))
    assert max(seen.values()) == 1
    last = {}
    for which, epoch, _ in seen:
        last[which] = max(last.get(which, 0), epoch)
    for which, final in last.items():
        for epoch in range(final):  # all but the epoch that is still going on
            assert {p for w, e, p in seen if (w, e) == (which, epoch)} == set(range(sets[which][0]))


def test_epochs_data_sets_and_seeds_have_their_own_order():
    def order(seed, which, epoch):
        mixture = Mixture([Numbers(0, 50), Numbers(1, 50)], weights=[1, 1], seed=seed)
        return tuple(p for w, e, p in map(mixture.locate, range(200)) if (w, e) == (which, epoch))

    assert len({order(*key) for key in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]}) == 4
    assert order(1, 0, 0) == order(1, 0, 0)


def test_the_order_is_the_one_of_earlier_versions():
    """A resumed run must go on with the same samples: these numbers may never change."""
    mixture = Mixture([Numbers(0, 1000), Numbers(1, 10)], weights=[0.7, 0.3], seed=1234)
    assert [mixture.locate(n) for n in (0, 1, 2, 3, 1000, 123456)] == [
        (0, 0, 998),
        (1, 0, 9),
        (0, 0, 132),
        (0, 0, 462),
        (0, 0, 246),
        (0, 86, 113),
    ]


@pytest.mark.parametrize("number", [0, 3, 7, 23])
def test_validation_runs_in_order_and_starts_again(number):
    assert InOrder(Numbers(0, 7)).sample(number)["ids"].tolist() == [0, number % 7, 0]
