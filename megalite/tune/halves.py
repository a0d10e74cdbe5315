"""The account of our engine's memory where backward passes are halved (parallel/later.py): zero-bubble schedules.

In: a shape, layouts with their stage splits, a runtime.  Out: moments, as from account.py. Rank r has, when a microbatch goes back,
activations of p - r of them, and for r more of them what their weights' gradients will be made of (Qi et al. 2023, arXiv:2401.10241):
`late`, of each product its input and its output's gradient. A block's activations become that as it goes back. Then the weights of the
oldest get their gradients, with nothing else at work, and buckets are filled by these alone; embedding and head have buckets of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from megalite.tune.account import Account, Moment, total
from megalite.tune.layouts import Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.splits import Split, halfway
from megalite.tune.turns import Halved


def moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[Moment]:
    alive = halfway(layouts, split)
    account = _Halved(shape, layouts, split, runtime, {**alive})
    yield account.start()
    name, found, _ = account.turn(alive["turn"])
    found["activations"] = found["activations"] + account.waiting(alive["turn"])
    yield name, found, total(found)
    several = (layouts.chunks > 1).any()  # else these states are all one
    for state in ("deep", "next")[: 1 + several]:
        yield from account.first_half(alive[state])
    yield account.end(alive["end"])
    for state in ("rest", "last")[: 1 + several]:
        yield from account.second_half(alive[state])


class _Halved(Account):
    """Of every kind of rank of every layout."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.one = self.layouts.chunks == 1
        self.follows = self.at_end
        if self.one.any():
            self.follows = self.gathered(replace(self.state["end"], summed=0.0 * self.at_end), closing=True)
        self.uncut = np.where(self.cut, self.whole, 0.0)  # a gradient of what a row put out, where that was scattered
        row = np.where(self.cut, self.whole, self.hidden)
        self.late = 2 * (self.hidden + row) + self.row * (self.columns + self.heads + self.wide + self.f)
        self.between, self.rest = self._at_work()
        self.work = np.maximum(self.between, self.rest)
        # let go with a product, once its weight's gradient is in a bucket: with the MLP's last one, and with the last of all
        self.down, self.up, _, self.qkv = (self.width * matrix for matrix in self.matrices)
        self.freed, self.left = self.row * self.f + row, self.hidden + self.row * self.columns
        # a column's input is gathered again, as parts from all ranks and in order
        self.second = np.maximum(self.up, self.uncut) + self.uncut - self.freed

    def waiting(self, alive: Halved) -> Array:
        """Of passes of which the second half is to come; and the gradient that a last rank has sent on. With one chunk it is let go with
        the next, for that is the next transfer.
        """
        sent = (self.layouts.microbatches > 1) & self.one
        return alive.late * self.late + sent * self.split.head * self.hidden

    def first_half(self, alive: Halved) -> Iterator[Moment]:
        """The last block of a chunk on its way forward; the first and the last block on their way back."""
        found, num = self.held(alive), alive.chunk
        found["activations"] = found["activations"] + self.waiting(alive)
        held = total(found)

        def moment(there: Array, grown: Array, working: Array, gathered: Array) -> Moment:
            parts = {**found, "activations": found["activations"] + grown, "working": working, "gathered": gathered}
            return "deep", parts, np.where(there, held + grown + working + gathered - found["gathered"], -np.inf)

        yield moment((num > 0) & (alive.top == 0), 0.0 * num, self.forth, found["gathered"])
        goes = self.goes * (num * self.block - self.matrices[0] > self.ahead)
        received, kept = self._received(alive)
        work, last = self.hidden + self.computed, alive.units - 1
        most = np.maximum(self.between - received, self.rest - received * (self.dropped == 0))
        # a norm at the block's end has gone back
        yield moment(num > 0, -self.normed, work + most - goes, self._to_the_end(alive, found["gathered"], last, num * self.block))
        work = work + self.work
        changed = (num - 1.0) * (self.late - self.kept) - kept - self.normed
        yield moment(num > 1, changed, work - self.goes, self._to_the_end(alive, found["gathered"], last, self.block))

    def _received(self, alive: Halved) -> tuple[Array, Array]:
        """The gradient that a chunk has received, which is counted there: its first block works with that one, unless a norm follows; and
        keeps it as that of what its last row put out, unless that is gathered or dropout makes another of it.
        """
        received = self.hidden * (alive.top == 0) * (self.normed == 0)
        return received, received * ~self.cut * (self.dropped == 0)

    def end(self, alive: Halved) -> Moment:
        """A chunk has gone back; the embedding is the very last."""
        found, num = {**self.held(alive, closing=True), "gathered": self._next(alive, alive.units - 1)}, alive.chunk
        _, kept = self._received(alive)
        found["activations"] = found["activations"] + self.waiting(alive) + num * (self.late - self.kept) - kept * (num > 0)
        found["working"] = np.where(alive.bottom * self.cut, self.whole, self.hidden) + alive.bottom * self.width * self.words
        found["buckets"] = found["buckets"] + alive.bottom * self.moved * self.shape.positions * self.shape.width
        return "end", found, total(found)

    def _next(self, alive: Halved, left: Array) -> Array:
        """Weights of ZeRO-3 when a microbatch has gone back; with one chunk, if others are `left`, a time comes when the next one follows
        at once.
        """
        return self._to_the_end(alive, np.where((left > 0) & self.one, self.follows, self.at_end), left, 0.0)

    def _to_the_end(self, alive: Halved, gathered: Array, left: Array, elements: Array | float) -> Array:
        """Where these are the last that are used in a step, nothing else is fetched ahead of its use."""
        ends = (left <= 0) & ~self.stay & np.where(self.one, self.layouts.microbatches <= self.split.place + 1, alive.next_forward == 0)
        return np.where(ends, np.minimum(gathered, self.gathers * (self.lasting + elements)), gathered)

    def _at_work(self) -> tuple[Array, Array]:
        """The most that a block needs at once beside what it has kept: between the MLP's products; the gradient of a column's input and its
        sum over ranks; those of queries, keys and values on their way to other ranks, side by side, by rank, and as they arrive.
        """
        between = self.uncut + self.row * (self.f + self.wide)
        gone = self.row * np.where(self.shape.gated, self.f, 0.0)
        mixed = self.row * self.heads * (self.layouts.cp > 1)
        summed = (self.layouts.tp > 1) * (np.where(self.cut, 4 * self.whole, 2 * self.whole) - mixed)
        grown = 2 * self.uncut - self.hidden * self.cut - mixed
        sent = (self.layouts.cp > 1) * (grown + 3.0 * self.row * self.columns)
        return between + self.dropped, np.maximum(summed, sent) - gone + self.dropped

    def second_half(self, alive: Halved) -> Iterator[Moment]:
        """The first bucket's first gradients, and the second's while the first is on its way."""
        found, large = dict(self.always), self.large
        sent = 1 - alive.bottom  # the gradient that was sent on
        found["activations"] = (
            alive.blocks * self.kept
            + (alive.units + alive.waiting + sent) * self.hidden
            + alive.heads * self.head
            + alive.embeds * self.normed
            + alive.late * self.late
        )
        found["gathered"] = self._next(alive, alive.units)
        held, there = total(found), alive.chunk > 0
        num = np.minimum(self.per, alive.chunk)
        rest = np.minimum(self.per, alive.chunk - num)
        # the embedding's gradient is on its way until a bucket of the blocks is sent; the head's makes room for its norm's
        words = self.words * alive.bottom
        ends, full, again = self.moved * words, self.moved * self.dense * num, self.moved * self.dense * rest

        def moment(there: Array, gone: Array, buckets: Array, working: Array) -> Moment:
            parts = {**found, "activations": found["activations"] - gone, "buckets": buckets, "working": working}
            return "reduction", parts, np.where(there, held - gone + buckets + working, -np.inf)

        both = np.maximum(self.down, self.second)
        made = np.where(large, np.maximum(self.down + ends, self.second + self.moved * self.matrices[0]), both)
        yield moment(there, 0.0 * num, np.where(large, 0.0, full + ends), made)
        yield moment(~large & (self.moved > 0) & (num < alive.chunk), num * self.late, full + again, both)
        if np.any(self.copied):  # for the host: an end's when the first bucket is full, and that one's when the second is
            there = there & (self.copied > 0)
            gone = np.where(large, 0.0, num * self.late - self.left)
            working = np.where(large, self.down, self.qkv) + self.copied * words
            yield moment(there, gone, np.where(large, 0.0, full) + ends, working)
            gone = np.where(large, self.freed, (num + rest) * self.late - self.left)
            working = np.where(large, self.up + self.down + self.uncut, self.qkv)
            working = working + self.copied * np.where(large, self.matrices[0], self.dense * num)
            yield moment(there, gone, np.where(large, 0.0, full + again), working)
