"""Who runs which layers: for every layout the ranks of a pipeline that can be the slowest or the fullest, as counts of layers.

In: a shape, layouts, and the runtime's rule.  Out: `Split`: of at most six ranks a layout, the blocks, whether embedding and head are
there, and the place in the pipeline. Of ranks with the same layers the first one matters alone: it has the most microbatches in flight
(where backward passes are halved, the last one, too). `flying` counts those.

Rules: `cost` is ours (parallel/stages.py); `threshold` is nanotron's (a layer is put on the stage at whose share of the cost it begins, and
the next stage begins behind the layer that passes the share); `even` is Megatron-LM's, layers / pp a stage, embedding and head at the ends.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.tune import turns
from megalite.tune.layouts import SCHEDULES, ZERO_BUBBLE, Array, Layouts
from megalite.tune.shape import Shape
from megalite.tune.turns import HALVED, STATES, Alive, Halved

WIDE = 6
INTERLEAVED = SCHEDULES.index("interleaved")
ROUNDS = 3  # of microbatches that are followed; what is in flight is not more in later ones


@dataclass(frozen=True)
class Split:
    """Arrays (kinds of ranks, n); where a layout has fewer kinds, its last one is repeated."""

    blocks: Array
    embed: Array
    head: Array
    place: Array  # of the rank in its pipeline
    pipeline: Array  # (n,), a number for each way to cut the layers
    chunks: list[list[tuple[int, ...]]]  # by that number: of every kind of rank the blocks of each of its chunks

    def take(self, rows: Any) -> Split:
        return Split(self.blocks[:, rows], self.embed[:, rows], self.head[:, rows], self.place[:, rows], self.pipeline[rows], self.chunks)


Kind = tuple[int, int, int, int, tuple[int, ...]]  # blocks, embed, head, place, blocks of each chunk


def split(shape: Shape, layouts: Layouts, rule: str) -> Split:
    """Of every layout."""
    block, head = _threshold_costs(shape) if rule == "threshold" else (shape.block_flops(), shape.head_flops())
    halved = layouts.schedule == ZERO_BUBBLE
    if np.ndim(shape.layers) == 0:  # one model: small numbers say which pipeline it is
        unique, back = np.unique(2000 * layouts.pp + 1000 * halved + layouts.chunks, return_inverse=True)
        keys = [(int(shape.layers), float(block), float(head), key // 2000, key % 1000, key // 1000 % 2) for key in unique.tolist()]
    else:
        columns = np.stack(np.broadcast_arrays(shape.layers, block, head, layouts.pp, layouts.chunks, halved), axis=1).astype(np.float64)
        several, back = np.unique(columns, axis=0, return_inverse=True)
        keys = [(int(layers), cost, last, int(pp), int(chunks), half) for layers, cost, last, pp, chunks, half in several.tolist()]
    kinds = [_kinds(*key[:5], rule, last=bool(key[5])) for key in keys]
    wide = max(len(ranks) for ranks in kinds)
    kinds = [[*ranks, *[ranks[-1]] * (wide - len(ranks))] for ranks in kinds]
    table = np.array([[kind[:4] for kind in ranks] for ranks in kinds], dtype=np.float64).transpose(2, 1, 0)  # (fields, kinds, keys)
    blocks, embed, head, place = np.ascontiguousarray(table)[:, :, back.ravel()]
    return Split(blocks, embed, head, place, back.ravel(), [[kind[4] for kind in ranks] for ranks in kinds])


def flying(layouts: Layouts, split: Split) -> dict[str, Alive]:
    """By moment: `turn`, the fullest with the head; `deep`, the fullest of blocks, and `next`, that where a chunk of the most blocks goes
    back; `end`, of the first chunk, or of a head that is alone in its chunk. All one, where a rank has one chunk.

    1F1B and zero-bubble hold the microbatches that are on their way behind a rank, GPipe all of them. With several chunks a rank is
    followed unit by unit, for its chunks are of different sizes.
    """
    chunked = layouts.several
    if chunked.all():
        return _named(_follow(layouts, split))
    m = layouts.microbatches
    held = np.where(layouts.schedule == SCHEDULES.index("gpipe"), m, np.minimum(m, layouts.pp - split.place))
    more = 1.0 * (m > held)  # then gradients have been summed when a rank is fullest
    nothing = np.zeros_like(split.blocks)
    waiting = (1 - split.head) * (layouts.pp > 1)
    fullest = np.stack(
        [
            *(held * split.blocks, held + nothing, held * split.head, held * split.embed),
            *(split.blocks, nothing, split.head, split.embed),
            *(waiting, more + nothing, nothing),
        ]
    )
    if not chunked.any():
        return _named([fullest] * len(STATES))
    found = np.stack([fullest] * len(STATES))  # (states, fields, kinds, n)
    found[..., chunked] = _follow(layouts.take(chunked), split.take(chunked))
    return _named(found)


def _named(states: Any) -> dict[str, Alive]:
    return {name: Alive(*state) for name, state in zip(STATES, np.asarray(states, dtype=np.float32), strict=True)}


def halfway(layouts: Layouts, split: Split) -> dict[str, Halved]:
    """The same where backward passes are halved; and of second halves `rest`, the fullest, and `last`, behind the embedding."""
    many = np.maximum(1, layouts.microbatches // layouts.pp)
    group, rounds = layouts.microbatches // many, np.minimum(many, ROUNDS)
    found = _once(layouts, split, group, rounds, layouts.recompute, functools.partial(_follow_halved, split))
    return {name: Halved(*state) for name, state in zip(HALVED, found, strict=True)}


def _follow(layouts: Layouts, split: Split) -> Array:
    """(states, fields, kinds, n) of schedules with several chunks."""
    breadth = layouts.schedule > INTERLEAVED
    rounds = np.where(breadth, 1, np.maximum(1, layouts.microbatches // layouts.pp))
    group, rounds = layouts.microbatches // rounds, np.where(breadth, 0, np.minimum(rounds, ROUNDS))
    kind = 2 * (layouts.recompute == 2) + (layouts.stage == 3)
    return _once(layouts, split, group, rounds, kind, functools.partial(_follow_whole, split))


def _once(layouts: Layouts, split: Split, group: Array, rounds: Array, kind: Array, follow: Callable[..., Array]) -> Array:
    """Layouts that have the same pipeline and rounds are followed once."""
    keys, back = np.unique((split.pipeline << 44) + (layouts.pp << 28) + (group << 4) + (kind << 2) + rounds, return_inverse=True)
    table = [follow(at, int(layouts.pp[at]), (int(group[at]), int(rounds[at])), int(kind[at])) for at in _firsts(back, len(keys))]
    return np.ascontiguousarray(np.stack(table, axis=-1), dtype=np.float32)[..., back.ravel()]


def _firsts(back: Array, num: int) -> list[int]:
    """Where each number from 0 to num - 1 stands first."""
    first = np.empty(num, dtype=np.int64)
    first[back.ravel()[::-1]] = np.arange(back.size)[::-1]
    return first.tolist()


def _ranks(split: Split, row: int) -> Iterator[tuple[tuple[int, ...], bool, bool, int]]:
    """Blocks of each chunk, embedding, head, place."""
    ends = zip(split.embed[:, row], split.head[:, row], split.place[:, row], strict=True)
    for sizes, (embed, head, place) in zip(split.chunks[split.pipeline[row]], ends, strict=True):
        yield sizes, bool(embed), bool(head), int(place)


def _follow_whole(split: Split, row: int, pp: int, rounds: tuple[int, int], kind: int) -> Array:
    """(states, fields, kinds)"""
    ranks = [
        turns.whole(sizes, embed, head, pp, place, rounds, full=kind > 1, streams=kind % 2 > 0)
        for sizes, embed, head, place in _ranks(split, row)
    ]
    return np.array(ranks).transpose(1, 2, 0)


def _follow_halved(split: Split, row: int, pp: int, rounds: tuple[int, int], recompute: int) -> Array:
    ranks = [turns.halved(sizes, embed, head, pp, place, rounds, recompute=recompute) for sizes, embed, head, place in _ranks(split, row)]
    return np.array(ranks).transpose(1, 2, 0)


def _threshold_costs(shape: Shape) -> tuple[Array, Array]:
    d = shape.width
    return 4 * d * shape.heads * shape.head_width + 3 * d * shape.mlp, d * shape.vocab


@functools.lru_cache(maxsize=4096)
def _kinds(layers: int, block: float, head: float, pp: int, chunks: int, rule: str, *, last: bool) -> list[Kind]:
    """The ranks that differ: without those between the ends that have no more in any chunk than one before them, of those with the same
    layers the first, and if `last` the last, and of too many kinds the fullest."""
    if rule == "even":
        sizes = [layers // pp + (rank < layers % pp) for rank in range(pp)]
        ranks = [(size, int(rank == 0), int(rank == pp - 1), rank, _even(size, chunks)) for rank, size in enumerate(sizes)]
    else:
        parts = _parts((layers, block, head), pp * chunks, rule)
        ranks = [_rank(parts[rank::pp], rank, layers + 1) for rank in range(pp)]
    found: dict[tuple[int, ...], Kind] = {}
    for place, rank in enumerate(ranks):
        if rank[2] or not any(all(map(operator.le, rank[4], other[4])) for other in ranks[:place]):
            found.setdefault(rank[:3], rank)
        if last and not any(all(map(operator.le, rank[4], other[4])) for other in ranks[place + 1 :]):
            found[(*rank[:3], 1)] = rank
    kinds = sorted(dict.fromkeys(found.values()), key=lambda kind: (-kind[1] - kind[2], -kind[0]))[:WIDE]  # both ends, then the fullest
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
