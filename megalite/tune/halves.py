"""The account of our engine's memory where backward passes are halved (parallel/later.py): zero-bubble schedules, one chunk a rank.

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
from megalite.tune.splits import Split, flying


def moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[Moment]:
    account = _Halved(shape, layouts, split, runtime, flying(layouts, split))
    yield account.start()
    yield from account.first_half()
    yield from account.second_half()


class _Halved(Account):
    """Of every kind of rank of every layout."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.num = self.split.blocks
        self.uncut = np.where(self.cut, self.whole, 0.0)  # a gradient of what a row put out, where that was scattered
        rows = np.where(self.cut, 2 * self.whole, 2 * self.hidden)
        self.late = 2 * self.hidden + rows + self.row * (self.columns + self.heads + self.wide + self.f)
        # the embedding's gradient is on its way until a bucket of the blocks is sent; the head's makes room for its norm's
        self.ends = self.words * self.split.embed

    def first_half(self) -> Iterator[Moment]:
        """Where most go back, and where most wait, which is another time if there are fewer microbatches than ranks."""
        m, place, most = self.layouts.microbatches, self.split.place, self.state["deep"].units
        yield from self._goes_back(most, np.minimum(place, m - most))
        if np.any(m < self.layouts.pp):
            waits = np.minimum(place, m - 1.0)
            yield from self._goes_back(np.minimum(m - waits, self.layouts.pp - place), waits)

    def _goes_back(self, units: Array, waits: Array) -> Iterator[Moment]:
        """The head; the last block on its way forward; the first and the last block on their way back; the embedding. `units` microbatches
        are there, this one included, and `waits` others are done but for their weights' gradients.
        """
        split = self.split
        alive = replace(self.state["deep"], blocks=units * self.num, units=units, heads=units * split.head, embeds=units * split.embed)
        # the gradient that a last rank has sent on is let go with its next transfer, which is the next gradient
        late, there = waits * self.num * self.late + (waits > 0) * split.head * self.hidden, self.num > 0
        name, found, _ = self.turn(alive)
        found["activations"] = found["activations"] + late
        yield name, found, total(found)
        found = self.held(alive)
        found["activations"] = found["activations"] + late
        forth = {**found, "working": self.forth}
        yield "deep", forth, np.where(there & (alive.top == 0), total(forth), -np.inf)
        found["activations"] = found["activations"] - self.normed  # a norm at the block's end has gone back
        work = self.hidden + self.computed + self._at_work(self.goes * (self.num * self.block - self.matrices[0] > self.ahead))
        received = self.hidden * (alive.top == 0) * (self.normed == 0)  # is counted there, and the gradient that the first block works with
        first = {**found, "working": work - received, "gathered": self._to_the_end(found["gathered"], units - 1, self.num * self.block)}
        yield "deep", first, np.where(there, total(first), -np.inf)
        kept = received * ~self.cut  # as the gradient of what the first block's last row put out
        changed = (self.num - 1.0) * (self.late - self.kept) - kept
        last = {**found, "activations": found["activations"] + changed, "working": self.hidden + self.computed + self._at_work(self.goes)}
        last["gathered"] = self._to_the_end(found["gathered"], units - 1, self.block)
        yield "deep", last, np.where(self.num > 1, total(last), -np.inf)
        end = {**self.held(alive, closing=True), "gathered": self._next(units - 1)}
        end["activations"] = end["activations"] + late + self.num * (self.late - self.kept) - kept * there
        end["working"] = np.where(alive.bottom * self.cut, self.whole, self.hidden) + alive.bottom * self.width * self.words
        end["buckets"] = end["buckets"] + alive.bottom * self.moved * self.shape.positions * self.shape.width
        yield "end", end, total(end)

    def _next(self, left: Array) -> Array:
        """Weights of ZeRO-3 when a microbatch has gone back; if others are `left`, a time comes when the next one follows at once."""
        there = np.where(left > 0, self.gathered(replace(self.state["end"], summed=0.0 * left), closing=True), self.at_end)
        return self._to_the_end(there, left, 0.0)

    def _to_the_end(self, gathered: Array, left: Array, elements: Array | float) -> Array:
        """Where these are the last that are used in a step, nothing else is fetched ahead of its use."""
        ends = (left <= 0) & (self.layouts.microbatches <= self.split.place + 1) & ~self.stay
        return np.where(ends, np.minimum(gathered, self.gathers * (self.lasting + elements)), gathered)

    def _at_work(self, goes: Array) -> Array:
        """The most that a block needs at once beside what it has kept: between the MLP's products; the gradient of a column's input and its
        sum over ranks; those of queries, keys and values on their way to other ranks, side by side, by rank, and as they arrive. The
        last product's weight `goes` when its input has a gradient.
        """
        between = self.uncut + self.row * (self.f + self.wide) + (self.width - 1.0) * self.dropped
        gone = self.row * np.where(self.shape.gated, self.f, 0.0)
        mixed = self.row * self.heads * (self.layouts.cp > 1)
        summed = (self.layouts.tp > 1) * (np.where(self.cut, 4 * self.whole, 2 * self.whole) - mixed)
        grown = 2 * self.uncut - self.hidden * self.cut - mixed
        sent = (self.layouts.cp > 1) * (grown + 3.0 * self.row * self.columns)
        return np.maximum(between, np.maximum(summed, sent) - gone) - goes

    def second_half(self) -> Iterator[Moment]:
        """The first bucket's first gradients, and the second's while the first is on its way."""
        layouts, split, w = self.layouts, self.split, self.width
        m = layouts.microbatches
        pending = np.minimum(split.place + 1.0, m)
        flying = np.clip(m - pending, 0, layouts.pp - split.place - 1.0)
        found = dict(self.always)
        found["activations"] = flying * (self.num * self.kept + self.hidden + split.embed * (self.normed + self.dropped))
        found["activations"] = found["activations"] + flying * split.head * self.head + pending * self.num * self.late
        found["activations"] = found["activations"] + self.hidden * (split.place > 0)  # the gradient that was sent on
        found["gathered"] = self._next(flying)
        there = self.num > 0
        num = np.minimum(self.per, self.num)
        rest = np.minimum(self.per, self.num - num)
        down, up, _, columns = (w * matrix for matrix in self.matrices)
        ends, full, again = self.moved * self.ends, self.moved * self.dense * num, self.moved * self.dense * rest

        def moment(there: Array, gone: Array, buckets: Array, working: Array) -> Moment:
            parts = {**found, "activations": found["activations"] - gone, "buckets": buckets, "working": working}
            return "reduction", parts, np.where(there, total(parts), -np.inf)

        # a product's input and gradient are let go when its weight's gradient is in a bucket; a column's input is gathered for it
        freed, held = self.row * self.f + np.where(self.cut, self.whole, self.hidden), self.hidden + self.row * self.columns
        second = np.maximum(up, self.uncut) + self.uncut - freed  # parts from all ranks, and in order
        both = np.maximum(down, second)
        made = np.where(self.large, np.maximum(down + ends, second + self.moved * self.matrices[0]), both)
        yield moment(there, np.zeros_like(made), np.where(self.large, 0.0, full + ends), made)
        yield moment(~self.large & (self.moved > 0) & (num < self.num), num * self.late, full + again, both)
        if np.any(self.copied):  # for the host: an end's when the first bucket is full, and that one's when the second is
            sent = np.where(self.large, down, columns)
            gone = np.where(self.large, 0.0, num * self.late - held)
            yield moment(there & (self.copied > 0), gone, np.where(self.large, 0.0, full) + ends, sent + self.copied * self.ends)
            gone = np.where(self.large, freed, (num + rest) * self.late - held)
            first = np.where(self.large, self.matrices[0], self.dense * num)
            sent = np.where(self.large, up + down + self.uncut, columns) + self.copied * first
            yield moment(there & (self.copied > 0), gone, np.where(self.large, 0.0, full + again), sent)
