"""The order of samples as a pure function: global sample number -> (data set, epoch, position), with no state and no index.

In: data sets, their weights and a seed. Out: sample i of a run, for any i at once; resuming takes one integer. Two parts:
`permute` shuffles an epoch by a Feistel network with cycle walking (Luby and Rackoff 1988; Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"): a bijection, so an epoch sees every sample once. `Blend` deals sample numbers to the data sets
along a Huffman tree (Huffman 1952) of balanced two-letter words (Morse and Hedlund 1940; the line of Bresenham 1965): at any
time a data set has had its exact share within 2 samples (the demand of Tijdeman 1980, "The chairman assignment problem").
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

ROUNDS = 6
LEAST_BITS = 8  # a Feistel network of a few bits reaches few permutations
WORD = (1 << 64) - 1


class DataSet(Protocol):
    """What `Causal` and `Masked` are: `len` samples an epoch, each a function of (index, epoch)."""

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> dict[str, np.ndarray]: ...


def scramble(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def permute(index: int, *, size: int, key: Sequence[int]) -> int:
    """The place of `index` in the permutation of range(size) that `key` names."""
    assert 0 <= index < size, f"index {index} is outside range({size})"
    state = 0
    for part in key:
        state = scramble(state ^ part)
    half = (max((size - 1).bit_length(), LEAST_BITS) + 1) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (scramble(state ^ scramble(right ^ turn << 56)) & mask)
        index = left << half | right
        if index < size:  # else outside: walk on along the cycle, which must come back
            return index


@dataclass(frozen=True)
class _Node:
    """A data set, or a fork that gives `share` of its numbers to the first branch."""

    leaf: int | None = None
    share: Fraction = Fraction(0)
    branches: tuple[_Node, _Node] | None = None


class Blend:
    """Deals 0, 1, 2, ... to data sets by weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        assert weights and min(weights) > 0, f"weights {weights} must be positive"
        heap = [(Fraction(weight), place, _Node(leaf=place)) for place, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (light, _, second), (heavy, place, first) = heapq.heappop(heap), heapq.heappop(heap)
            share = (heavy / (heavy + light)).limit_denominator(1 << 32)
            heapq.heappush(heap, (light + heavy, place, _Node(share=share, branches=(first, second))))
        self._root = heap[0][2]

    def locate(self, number: int) -> tuple[int, int]:
        """Which data set gets this number, and how many it got before."""
        node = self._root
        while node.branches is not None:
            before, after = _dealt(number, node.share), _dealt(number + 1, node.share)
            node, number = (node.branches[0], before) if after > before else (node.branches[1], number - before)
        assert node.leaf is not None
        return node.leaf, number


def _dealt(number: int, share: Fraction) -> int:
    """How many of the first `number` the first branch gets: number * share, rounded; exact in integers."""
    return (2 * number * share.numerator + share.denominator) // (2 * share.denominator)


class Mixture:
    """Sample i of a training run, drawn from several shuffled data sets by weight."""

    def __init__(self, datasets: Sequence[DataSet], *, weights: Sequence[float], seed: int) -> None:
        assert len(datasets) == len(weights)
        self.datasets, self.seed = tuple(datasets), seed
        self._blend = Blend(weights)

    def locate(self, number: int) -> tuple[int, int, int]:
        """(data set, epoch, position) of a global sample number."""
        which, count = self._blend.locate(number)
        size = len(self.datasets[which])
        epoch, index = divmod(count, size)
        return which, epoch, permute(index, size=size, key=(self.seed, which, epoch))

    def sample(self, number: int) -> dict[str, np.ndarray]:
        which, epoch, position = self.locate(number)
        return self.datasets[which].sample(position, epoch)


class InOrder:
    """Sample i of a validation: the first epoch of one data set, unshuffled, from the start again at its end."""

    def __init__(self, dataset: DataSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def sample(self, number: int) -> dict[str, np.ndarray]:
        return self.dataset.sample(number % len(self.dataset), 0)
