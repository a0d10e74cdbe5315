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
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.tune.layouts import SCHEDULES, ZERO_BUBBLE, Array, Layouts
from megalite.tune.shape import Shape

WIDE = 6
INTERLEAVED = SCHEDULES.index("interleaved")
ROUNDS = 3  # of microbatches that are followed; what is in flight is not more in later ones
STATES = ("turn", "deep", "next", "end")


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


@dataclass(frozen=True)
class Alive:
    """What a rank holds when a chunk of its layers begins its way back, (kinds, n) each; ones and zeros say yes and no."""

    blocks: Array  # with activations, once a microbatch
    units: Array  # chunks, once a microbatch
    heads: Array  # those of them with the head
    embeds: Array  # and with the embedding
    chunk: Array  # blocks of the one that goes back
    behind: Array  # blocks of the chunks behind that one
    top: Array  # it has the head
    bottom: Array  # it has the embedding
    waiting: Array  # hidden states that were received: its gradient, and inputs and gradients of others that came early
    summed: Array  # blocks have been back before in this step
    next_forward: Array  # its next chunk goes forward, which is 2 with the embedding; 0: it goes back, or there is one chunk


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


def _follow(layouts: Layouts, split: Split) -> Array:
    """(states, fields, kinds, n) of schedules with several chunks; layouts that have the same pipeline and rounds are followed once."""
    breadth = layouts.schedule > INTERLEAVED
    rounds = np.where(breadth, 1, np.maximum(1, layouts.microbatches // layouts.pp))
    group, rounds = layouts.microbatches // rounds, np.where(breadth, 0, np.minimum(rounds, ROUNDS))
    kind = 2 * (layouts.recompute == 2) + (layouts.stage == 3)
    keys, back = np.unique((split.pipeline << 44) + (layouts.pp << 28) + (group << 4) + (kind << 2) + rounds, return_inverse=True)
    table = [_followed(split, at, int(layouts.pp[at]), int(group[at]), int(rounds[at]), int(kind[at])) for at in _firsts(back, len(keys))]
    return np.ascontiguousarray(np.stack(table, axis=-1))[..., back.ravel()]


def _firsts(back: Array, num: int) -> list[int]:
    """Where each number from 0 to num - 1 stands first."""
    first = np.empty(num, dtype=np.int64)
    first[back.ravel()[::-1]] = np.arange(back.size)[::-1]
    return first.tolist()


def _followed(split: Split, row: int, pp: int, group: int, rounds: int, kind: int) -> Array:
    """(states, fields, kinds)"""
    chunks, ends = split.chunks[split.pipeline[row]], zip(split.embed[:, row], split.head[:, row], split.place[:, row], strict=True)
    ranks = [
        _unit_by_unit(sizes, bool(embed), bool(head), pp, int(place), (group, rounds), full=kind > 1, streams=kind % 2 > 0)
        for sizes, (embed, head, place) in zip(chunks, ends, strict=True)
    ]
    return np.array(ranks).transpose(1, 2, 0)


@functools.lru_cache(maxsize=65536)
def _unit_by_unit(
    sizes: tuple[int, ...], embed: bool, head: bool, pp: int, place: int, rounds: tuple[int, int], *, full: bool, streams: bool
) -> tuple[Any, ...]:
    """The states of a rank with chunks of so many blocks; `rounds`: microbatches in a round, and rounds, or none if all microbatches go
    forward through all chunks first (looped). `full`: of a block a hidden state is kept, as between chunks, and not many times that;
    `streams`: weights come and go.
    """
    group, many = rounds
    v, total = len(sizes), group * max(many, 1) * len(sizes)
    turns, size = np.arange(total), np.asarray(sizes)
    chunk = turns // group % v  # of each forward
    going = v - 1 - chunk  # of each backward
    started = np.minimum((v - 1) * group + 2 * (pp - place - 1) + 1 + turns, total) if many else np.full(total, total)

    def alive(forward: Array, backward: Array) -> Array:
        return _sums(forward)[started] - _sums(backward)[:-1]

    top, bottom = (going == v - 1) * head, (going == 0) * embed
    blocks, units = alive(size[chunk], size[going]), started - turns
    heads, embeds = alive((chunk == v - 1) * head, top), alive((chunk == 0) * embed, bottom)
    summed = np.concatenate([[False], np.logical_or.accumulate(size[going] > 0)[:-1]])
    inputs, grads = _early(v, pp, place, group, total) if many else (0, max(group - pp + 1, 1) if place == pp - 1 else 1)
    ahead = _sums(1 - (chunk == 0) * embed)
    waiting = ahead[np.minimum(started + inputs, total)] - ahead[started]
    grads = grads + (turns < group - 1) * (bool(many) & (place == pp - 2) & (group < pp))  # such a rank waits once, and is behind then
    ahead = _sums(1 - top)
    waiting = waiting + ahead[np.minimum(turns + grads, total)] - ahead[turns]
    behind = size[::-1].cumsum()[::-1] - size
    next_forward = (started < total) * (1 + (np.append(chunk, 1)[started] == 0) * embed)
    fields = [blocks, units, heads, embeds, size[going], behind[going], top, bottom, waiting, summed, next_forward]
    held = units + waiting
    weight = blocks + held if full else blocks * 2 * (total + 1) + held
    # an embedding is in the way of what would be fetched ahead; most of it where a forward is near
    fetched = ((next_forward == 1) * (max(sizes) - size[going]) + (next_forward < 2)) * streams
    rank = (weight * (max(sizes) + 2) + fetched) * 2 + summed

    def fullest(there: Array) -> int:
        return int(np.where(there, rank, -1).argmax())

    found = [fullest(there) for there in (going == v - 1, size[going] > 0, size[going] == max(sizes))]
    alone = head and not size[-1]
    states = [*found, found[0] if alone else fullest(going == 0)]
    return tuple(map(tuple, np.stack(fields).astype(float)[:, states].T.tolist()))


def _sums(each: Array) -> Array:
    return np.concatenate([[0], np.cumsum(each)])


def _early(v: int, pp: int, place: int, group: int, total: int) -> tuple[int, int]:
    """Of how many of its next forwards an interleaved rank has received the inputs when it goes back, and of how many backwards, this one
    included, the gradients: parallel/pipeline.py, `exchanged`. (Where rounds have more microbatches than ranks, a rank may come to wait
    that never did before; then the last one of a pipeline has up to a few gradients less.)
    """

    def begun(place: int) -> int:
        """The step from which a rank takes turns."""
        return max(v * pp + 2 * (pp - 1 - place), place + min((v - 1) * group + 2 * (pp - 1 - place), total))

    apart = begun(0) - begun(pp - 1)  # around the corner, from the last rank to the first and back, things come a round earlier
    inputs = apart // 2 + group - 2 * (pp - 1) if place == 0 else 1
    grads = 1 + (2 * group - 1 - apart) // 2 if place == pp - 1 else 1
    return max(inputs, 0), max(grads, 1)


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
    kinds = sorted(found.values(), key=lambda kind: (-kind[1] - kind[2], -kind[0]))[:WIDE]  # both ends, then the fullest
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
