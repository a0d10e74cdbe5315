"""What a rank with several chunks of layers holds, turn by turn, in the order of the schedules (parallel/pipeline.py, `exchanged`).

In: the blocks of its chunks, its place, the microbatches.  Out: `Alive`, at the moments when it is fullest; plain numbers, for one layout.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megalite.tune.layouts import Array

STATES = ("turn", "deep", "next", "end")
HALVED = (*STATES, "rest", "last")  # where backward passes are halved, the second half too


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


@dataclass(frozen=True)
class Halved(Alive):
    """The same where backward passes are halved."""

    late: Array  # blocks, once a microbatch, whose weights' gradients are still to be made


@functools.lru_cache(maxsize=65536)
def whole(
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


@functools.lru_cache(maxsize=65536)
def halved(
    sizes: tuple[int, ...], embed: bool, head: bool, pp: int, place: int, rounds: tuple[int, int], *, recompute: int
) -> tuple[Any, ...]:
    """The same of zero-bubble schedules, with one chunk or several, and of the second halves the fullest, and the fullest behind the
    embedding, or on a rank without one of a chunk of the most blocks: there `chunk` gets its weights' gradients, and `bottom` says that the
    embedding has just gone back.
    """
    group, many = rounds
    v, total = len(sizes), group * many * len(sizes)
    turns, size = np.arange(total), np.asarray(sizes)
    chunk = turns // group % v  # of each forward
    going = v - 1 - chunk  # of each first half, and of each second half, `place` turns later
    started = np.minimum((v - 1) * group + pp - place + turns, total)
    top, bottom = (going == v - 1) * head, (going == 0) * embed
    received = 1 - (chunk == 0) * embed
    behind = size[::-1].cumsum()[::-1] - size
    inputs, grads = _early_halves(pp, place, group, many) if v > 1 else ((0, 0), (int(not head), 0))

    def alive(forward: Array, backward: Array, done: Array) -> Array:
        return _sums(forward)[started] - _sums(backward)[done]

    def there(done: Array, half: int) -> list[Array]:
        """Blocks, chunks, heads and embeddings, and hidden states that were received."""
        ahead, back = _sums(received), _sums(1 - top)
        waiting = ahead[np.minimum(started + inputs[half], total)] - ahead[started]
        waiting = waiting + back[np.minimum(done + grads[half], total)] - back[done]
        heads, embeds = alive((chunk == v - 1) * head, top, done), alive((chunk == 0) * embed, bottom, done)
        return [alive(size[chunk], size[going], done), started - done, heads, embeds, waiting]

    late, summed = _sums(size[going]), turns > place
    next_forward = (v > 1) * (started < total) * (1 + (np.append(chunk, 1)[started] == 0) * embed)
    blocks, units, heads, embeds, waiting = there(turns, 0)
    waits = late[turns] - late[np.maximum(turns - place, 0)]
    first = [blocks, units, heads, embeds, size[going], behind[going], top, bottom, waiting, summed, next_forward, waits]
    # behind first half k comes second half k - place, and when all first halves are done the rest
    blocks, units, heads, embeds, waiting = there(turns + 1, 1)
    its = np.maximum(turns - place, 0)
    waits = late[turns + 1] - late[its]
    begun = turns >= min(place, total - 1)
    second = [blocks, units, heads, embeds, size[going][its], behind[going], 0 * turns, bottom, waiting, summed, next_forward, waits]
    kept = (1.0, 0.65, 0.0625)[recompute]  # of a block, beside what its weights' gradients are made of

    def fullest(fields: list[Array], there: Array) -> list[float]:
        weight = kept * fields[0] + fields[-1] + 1e-3 * (fields[1] + fields[8])
        return [float(field[np.where(there, weight, -1.0).argmax()]) for field in fields]

    most = size.max()
    states = [(going == v - 1), size[going] > 0, size[going] == most, going == 0]
    found = [fullest(first, state) for state in states]
    if head and not size[-1]:
        found[3] = found[0]
    done = begun & (second[4] > 0)
    return *map(tuple, found), *(tuple(fullest(second, states)) for states in (done, done & (bottom > 0 if embed else second[4] == most)))


def _early_halves(pp: int, place: int, group: int, many: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """As `_early`, in first halves and behind them; read off `exchanged`. What goes around the corner comes early."""
    inputs = max(group - (pp + 1) // 3, 0) if place == 0 and many > 1 else 0
    grads = max(group - (pp > 2) * (pp // 2), 1) if place == pp - 1 else 1
    return (inputs, inputs + (pp % 3 == 2) * (inputs > 0)), (grads, grads - (pp == 2 or place < pp - 1))
