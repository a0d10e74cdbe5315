"""Who runs which layers: for every layout the ranks of a pipeline that can be the slowest or the fullest, as counts of layers.

In: a shape, layouts, and the runtime's rule.  Out: `Split`: of at most six ranks a layout, the blocks, whether embedding and head are
there, and the place in the pipeline. Of ranks with the same layers the first one matters alone: it has the most microbatches in flight.
`flying` counts those.

Rules: `cost` is ours (parallel/stages.py); `threshold` is nanotron's (a layer is put on the stage at whose share of the cost it begins, and
the next stage begins behind the layer that passes the share); `even` is Megatron-LM's, layers / pp a stage, embedding and head at the ends.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.tune.layouts import SCHEDULES, Array, Layouts
from megalite.tune.shape import Shape

WIDE = 6
INTERLEAVED = SCHEDULES.index("interleaved")
ROUNDS = 3  # of microbatches that are followed; what is in flight is not more in later ones


@dataclass(frozen=True)
class Split:
    """Arrays (n, kinds of ranks); where a layout has fewer kinds, its last one is repeated."""

    blocks: Array
    embed: Array
    head: Array
    place: Array  # of the rank in its pipeline
    pipeline: Array  # (n,), a number for each way to cut the layers
    chunks: list[list[tuple[int, ...]]]  # by that number: of every kind of rank the blocks of each of its chunks

    def take(self, rows: Any) -> Split:
        return Split(self.blocks[rows], self.embed[rows], self.head[rows], self.place[rows], self.pipeline[rows], self.chunks)


@dataclass(frozen=True)
class Flying:
    """What a rank holds the activations of, at the fullest moment that goes back through the head, and through blocks; (n, kinds) each."""

    turn_blocks: Array  # blocks, once a microbatch
    turn_chunks: Array  # chunks, once a microbatch
    deep_blocks: Array
    deep_chunks: Array


Kind = tuple[int, int, int, int, tuple[int, ...]]  # blocks, embed, head, place, blocks of each chunk


def split(shape: Shape, layouts: Layouts, rule: str) -> Split:
    """Of every layout."""
    block, head = _threshold_costs(shape) if rule == "threshold" else (shape.block_flops(), shape.head_flops())
    if np.ndim(shape.layers) == 0:  # one model: two small numbers say which pipeline it is
        unique, back = np.unique(layouts.pp * 1000 + layouts.chunks, return_inverse=True)
        keys = [(int(shape.layers), float(block), float(head), *divmod(key, 1000)) for key in unique.tolist()]
    else:
        columns = np.stack(np.broadcast_arrays(shape.layers, block, head, layouts.pp, layouts.chunks), axis=1).astype(np.float64)
        several, back = np.unique(columns, axis=0, return_inverse=True)
        keys = [(int(layers), cost, last, int(pp), int(chunks)) for layers, cost, last, pp, chunks in several.tolist()]
    kinds = [_kinds(*key, rule) for key in keys]
    wide = max(len(ranks) for ranks in kinds)
    kinds = [[*ranks, *[ranks[-1]] * (wide - len(ranks))] for ranks in kinds]
    found = np.array([[kind[:4] for kind in ranks] for ranks in kinds], dtype=np.float64)[back.ravel()]
    blocks, embed, head, place = (np.ascontiguousarray(found[:, :, column]) for column in range(4))
    return Split(blocks, embed, head, place, back.ravel(), [[kind[4] for kind in ranks] for ranks in kinds])


def flying(layouts: Layouts, split: Split) -> Flying:
    """1F1B holds the microbatches that are on their way behind a rank; GPipe and the looped schedule hold all; interleaved 1F1B is followed
    step by step, for its chunks are of different sizes.
    """
    m, pp, v, kind = (column[:, None] for column in (layouts.microbatches, layouts.pp, layouts.chunks, layouts.schedule))
    one = np.where(kind == 0, np.minimum(m, pp - split.place), m)
    blocks, chunks = one * split.blocks, np.where(kind == 0, one, one * v)
    found = np.stack([blocks, chunks, blocks, chunks])
    rows = np.flatnonzero(layouts.schedule == INTERLEAVED)
    if len(rows):
        few = layouts.take(rows)
        rounds = np.maximum(1, few.microbatches // few.pp)
        group, rounds = few.microbatches // rounds, np.minimum(rounds, ROUNDS)
        keys, back = np.unique((split.pipeline[rows] << 32) + (few.pp << 16) + (group << 2) + rounds, return_inverse=True)
        table = np.array([_followed(split, rows[at], few, at, group, rounds) for at in _firsts(back, len(keys))])  # (keys, kinds, 4)
        found[:, rows] = np.moveaxis(table[back.ravel()], 2, 0)
    return Flying(*found)


def _firsts(back: Array, num: int) -> list[int]:
    """Where each number from 0 to num - 1 stands first."""
    first = np.empty(num, dtype=np.int64)
    first[back.ravel()[::-1]] = np.arange(back.size)[::-1]
    return first.tolist()


def _followed(split: Split, row: int, few: Layouts, at: int, group: Array, rounds: Array) -> list[tuple[float, ...]]:
    chunks, places = split.chunks[split.pipeline[row]], split.place[row]
    return [
        _interleaved(sizes, int(few.pp[at] - place), int(group[at]), int(rounds[at])) for sizes, place in zip(chunks, places, strict=True)
    ]


@functools.lru_cache(maxsize=65536)
def _interleaved(sizes: tuple[int, ...], behind: int, group: int, rounds: int) -> tuple[float, ...]:
    """The fields of `Flying` of a rank with chunks of so many blocks, `behind` - 1 ranks after it, and `group` microbatches a round."""
    v, total = len(sizes), group * rounds * len(sizes)
    turns = np.arange(total)
    chunk = turns // group % v  # of each forward; the backward passes come in the order v - 1, ..., 0
    forward, backward = (np.concatenate([[0], np.cumsum(np.asarray(sizes)[order])]) for order in (chunk, v - 1 - chunk))
    started = np.minimum((v - 1) * group + 2 * (behind - 1) + 1 + turns, total)  # forwards, when each backward begins
    blocks, units = forward[started] - backward[:-1], started - turns
    rank = blocks * (total + 1) + units
    turn, deep = (np.where(there, rank, -1).argmax() for there in (chunk == 0, np.asarray(sizes)[v - 1 - chunk] > 0))
    return float(blocks[turn]), float(units[turn]), float(blocks[deep]), float(units[deep])


def _threshold_costs(shape: Shape) -> tuple[Array, Array]:
    d = shape.width
    return 4 * d * shape.heads * shape.head_width + 3 * d * shape.mlp, d * shape.vocab


@functools.lru_cache(maxsize=4096)
def _kinds(layers: int, block: float, head: float, pp: int, chunks: int, rule: str) -> list[Kind]:
    """The ranks that differ: of those with the same layers the first, and of too many kinds the fullest."""
    if rule == "even":
        sizes = [layers // pp + (rank < layers % pp) for rank in range(pp)]
        ranks = [(size, int(rank == 0), int(rank == pp - 1), rank, _even(size, chunks)) for rank, size in enumerate(sizes)]
    else:
        parts = _parts((layers, block, head), pp * chunks, rule)
        ranks = [_rank(parts[rank::pp], rank, layers + 1) for rank in range(pp)]
    first: dict[tuple[int, int, int], Kind] = {}
    for rank in ranks:
        first.setdefault((rank[0], rank[1], rank[2]), rank)
    kinds = sorted(first.values(), key=lambda kind: (-kind[1] - kind[2], -kind[0]))[:WIDE]  # both ends, then the fullest
    return sorted(kinds, key=lambda kind: kind[3])


def _rank(chunks: list[range], place: int, last: int) -> Kind:
    blocks = tuple(sum(0 < layer < last for layer in chunk) for chunk in chunks)
    ends = [int(any(end in chunk for chunk in chunks)) for end in (0, last)]
    return sum(blocks), ends[0], ends[1], place, blocks


def _even(size: int, num: int) -> tuple[int, ...]:
    return tuple(size // num + (part < size % num) for part in range(num))


def _parts(costs: tuple[int, float, float], num: int, rule: str) -> list[range]:
    layers, block, head = costs
    if rule == "threshold":
        return _by_threshold([0.0, *[block] * layers, head], num)
    return _balanced(costs)(num)


def _by_threshold(costs: list[float], num: int) -> list[range]:
    total, seen, stage = sum(costs), 0.0, 0
    starts = [0] * num + [len(costs)]
    for layer, cost in enumerate(costs):
        seen += cost
        if seen > total * (stage + 1) / num and stage < num - 1:
            stage += 1
            starts[stage] = layer + 1
    for later in range(stage + 1, num):
        starts[later] = len(costs)
    return [range(starts[index], starts[index + 1]) for index in range(num)]


@functools.lru_cache(maxsize=64)
def _balanced(costs: tuple[int, float, float]):
    """parallel/stages.py's answer for every number of parts from one table; a table costs layers^3 steps."""
    layers, block, head = costs
    sums = np.cumsum([0.0, 0.0, *[block] * layers, head])
    num, most = layers + 2, layers + 2
    best: list[list[tuple[float, float, int]]] = [[(math.inf, math.inf, 0)] * (num + 1) for _ in range(most + 1)]
    best[0][0] = (0.0, 0.0, 0)
    plain = sums.tolist()
    for parts in range(1, most + 1):
        below, here = best[parts - 1], best[parts]
        for stop in range(parts, num + 1):
            here[stop] = min(
                (max(below[start][0], plain[stop] - plain[start]), below[start][1] + (plain[stop] - plain[start]) ** 2, start)
                for start in range(parts - 1, stop)
            )

    def cut(parts: int) -> list[range]:
        ranges, stop = [], num
        for index in range(parts, 0, -1):
            start = best[index][stop][2]
            ranges.append(range(start, stop))
            stop = start
        return ranges[::-1]

    return cut
