"""Who runs which layers: for every layout the ranks of a pipeline that can be the slowest or the fullest, as counts of layers.

In: a shape, layouts, and the runtime's rule.  Out: `Split`: of at most six ranks a layout, the blocks, whether embedding and head are
there, and the place in the pipeline. Of ranks with the same layers the first one matters alone: it has the most microbatches in flight.

Rules: `cost` is ours (parallel/stages.py); `threshold` is nanotron's (a layer is put on the stage at whose share of the cost it begins, and
the next stage begins behind the layer that passes the share); `even` is Megatron-LM's, layers / pp a stage, embedding and head at the ends.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from megalite.tune.layouts import Array, Layouts
from megalite.tune.shape import Shape

WIDE = 6


@dataclass(frozen=True)
class Split:
    """Arrays (n, kinds of ranks); where a layout has fewer kinds, its last one is repeated."""

    blocks: Array
    embed: Array
    head: Array
    place: Array  # of the rank in its pipeline
    most: Array  # blocks of the rank's largest chunk


Kind = tuple[int, int, int, int, int]  # blocks, embed, head, place, blocks of the largest chunk


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
    table = np.array([[*ranks, *[ranks[-1]] * (wide - len(ranks))] for ranks in kinds], dtype=np.float64)
    found = table[back.ravel()]
    return Split(*(np.ascontiguousarray(found[:, :, column]) for column in range(5)))


def _threshold_costs(shape: Shape) -> tuple[Array, Array]:
    d = shape.width
    return 4 * d * shape.heads * shape.head_width + 3 * d * shape.mlp, d * shape.vocab


@functools.lru_cache(maxsize=4096)
def _kinds(layers: int, block: float, head: float, pp: int, chunks: int, rule: str) -> list[Kind]:
    """The ranks that differ: of those with the same layers the first, and of too many kinds the fullest."""
    if rule == "even":
        sizes = [layers // pp + (rank < layers % pp) for rank in range(pp)]
        ranks = [(size, int(rank == 0), int(rank == pp - 1), rank, math.ceil(size / chunks)) for rank, size in enumerate(sizes)]
    else:
        parts = _parts((layers, block, head), pp * chunks, rule)
        ranks = [_rank(parts[rank::pp], rank, layers + 1) for rank in range(pp)]
    first: dict[tuple[int, int, int], Kind] = {}
    for rank in ranks:
        first.setdefault((rank[0], rank[1], rank[2]), rank)
    kinds = sorted(first.values(), key=lambda kind: (-kind[1] - kind[2], -kind[0]))[:WIDE]  # both ends, then the fullest
    return sorted(kinds, key=lambda kind: kind[3])


def _rank(chunks: list[range], place: int, last: int) -> Kind:
    blocks = [sum(0 < layer < last for layer in chunk) for chunk in chunks]
    ends = [int(any(end in chunk for chunk in chunks)) for end in (0, last)]
    return sum(blocks), ends[0], ends[1], place, max(blocks)


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
