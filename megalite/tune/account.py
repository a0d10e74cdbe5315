"""The account of our engine's memory, at the moments of memory.py: DeepSpeed's flat buffers and buckets (parallel/zero.py), the tensors
that autograd keeps of each block (models/layers.py), and what the schedule holds (parallel/pipeline.py).

In: a shape, layouts with their stage splits, a runtime.  Out: bytes by part, moment by moment, for every kind of rank, (kinds, n). Read off
the dry run operator by operator; tests/ranks/test_closed_form.py holds the two together. Of the ranks that share weights, the last one is
the first to get gradients of its own, and the first one the last; what either holds is counted.

Gradients come in the order of the backward pass: the head's weight, then block by block those of the MLP's second and first product, of
attention's projection and of queries, keys and values; the embedding's last. They fill buckets. A full one is lined up a second time and
goes to the other ranks. ZeRO-2 adds what comes back to sums in fp32, which are made in every step when the first gradient of their kind
(the vocabulary's, or the blocks') comes back; ZeRO-3 has its sums all the time, here or on the host. ZeRO 0 and 1 add each gradient to
whole sums, which are there all the time, and know no buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from megalite.tune.layouts import Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.sizes import Parts, Sizes
from megalite.tune.splits import Alive, Split, flying


def moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[tuple[str, Parts]]:
    """Each moment's name and its bytes by part."""
    alive = flying(layouts, split)
    account = _Account(shape, layouts, split, runtime, alive)
    yield "start-up", {**account.always, "batch": np.zeros_like(account.own)}
    yield from (("turn", account.turn(alive[state])) for state in ("turn", "turned"))
    yield from (("deep", account.deep(alive[state])) for state in ("deep", "next"))
    yield "deep", account.flushed(alive["deep"])
    yield "reduction", account.reduction(alive["deep"])
    yield "reduction", account.large_head(alive["turn"])
    yield from (("end", account.closing(state)) for state in (alive["deep"], alive["end"]))


class _Account(Sizes):
    """Of every kind of rank of every layout."""

    def sums(self, summed: Array | float, ended: Array | float) -> Array:
        """The sums in fp32 that ZeRO-2 makes in every step, of blocks and of embedding or head; at once, where no weight is tied."""
        if np.all(self.shape.tied):
            return summed * self.sum_blocks + ended * self.sum_ends
        either = np.maximum(summed, ended)
        if not np.any(self.shape.tied):
            return either * self.sums_of_all
        return np.where(self.shape.tied, summed * self.sum_blocks + ended * self.sum_ends, either * self.sums_of_all)

    def _state(self, alive: Alive, *, turn: bool = False, closing: bool = False) -> Parts:
        """What is there beside what is at work. Buckets of ZeRO-2, of which two overlap, are made for each backward pass."""
        found = dict(self.always)
        top: Any = 0.0 if turn else alive.top  # the head has gone back
        gone = top * alive.bottom if closing else top  # what the head was made of; but what a chunk received stays until its end
        found["activations"] = (
            alive.blocks * self.kept + (alive.units + alive.waiting - gone) * self.hidden + (alive.heads - top) * self.head
        )
        if turn:
            found["gathered"] = self.at_turn
            found["gradients"] = found["gradients"] + self.sums(alive.summed, alive.ended)
            return found
        found["gathered"] = self.at_end if closing else self.at_deep
        found["buckets"] = self.with_buckets
        ended = np.maximum(alive.ended, np.maximum(alive.top, alive.bottom) if closing else alive.top * self.large)
        found["gradients"] = self.waiting + self.sums(alive.summed, ended) + alive.top * self.held_on
        return found

    def turn(self, alive: Alive) -> Parts:
        found = self._state(alive, turn=True)
        # the gradients of the head's weight and input, and the padded weight
        weight = self.width * self.words * self.padded * (1 + (self.padded > 1))
        found["working"] = alive.top * (weight + self.whole)
        return found

    def deep(self, alive: Alive, *, flushed: bool = False) -> Parts:
        found = self._state(alive)
        late: Any = 0.0 if flushed else np.where(alive.top > 0, 0.0, self.late)
        work = self.computed + np.maximum(self.first - late, self.after)
        found["working"] = np.where(alive.chunk > 0, self.coming + np.maximum(work, self.exchanged - late), 0.0)
        return found

    def flushed(self, alive: Alive) -> Parts:
        """The first bucket of ZeRO-2 has been full, and sums are there from then on."""
        first = alive.top * self.alone * self.words
        gone = np.floor(np.maximum(self.bucket - first * (first <= self.bucket), 0.0) / self.block) + 1
        there = (gone < alive.chunk) & (self.stage == 2)
        ended = np.maximum(alive.ended, first > 0)
        after = replace(alive, blocks=alive.blocks - gone, summed=np.ones_like(self.own), ended=ended)
        return _where(there, self.deep(after, flushed=True))

    def _copies(self, elements: Array, *, mine: Array | float, largest: Array) -> Array:
        """A full bucket is lined up again, and of this rank's share of it there is a copy in fp32, of `mine` elements at once; under ZeRO-3
        of all of its share, and if the sums are on the host then a second one of the share of its `largest` weight.
        """
        second = self.shares * (self.offload >= 1) * largest
        return self.shares * elements + np.maximum(self.lined * elements, second) + 4.0 * mine * self.plain

    def reduction(self, alive: Alive) -> Parts:
        """The first bucket is full."""
        w, first = self.width, alive.top * self.alone * self.words
        together = np.where(first <= self.bucket, first, 0.0)
        filled, blocks, (down, up, out) = self.fill(together, self.bucket)
        there = (blocks < alive.chunk) & ~self.once
        block = self.kept + self.computed - self.hidden * (blocks > 0)
        mlp, residual = self.mlp, self.hidden
        left = np.select(
            [out, up, down],
            [
                2 * self.hidden + w * self.matrices[3],
                block - mlp - residual + self.row * self.heads + w * self.matrices[2],
                block - mlp + self.whole + w * self.matrices[1],
            ],
            block + self.first,
        )
        found = self._state(replace(alive, summed=np.ones_like(self.own), ended=np.maximum(alive.ended, together > 0)))
        found["activations"] = found["activations"] - (blocks + 1) * self.kept
        # what may be fetched ahead ends with the blocks, where the embedding is next and does not fit
        ends = (alive.bottom > 0) & (alive.behind == 0) & (self.words > self.ahead)
        rest = self.lasting + alive.chunk * self.block + together - filled
        found["gathered"] = np.where(ends, np.minimum(found["gathered"], self.gathers * rest), found["gathered"])
        found["working"] = self.coming + left + self._copies(filled, mine=self.part, largest=self.largest)
        return _where(there, found)

    def large_head(self, alive: Alive) -> Parts:
        """A head's gradient that is too large for a bucket goes to the other ranks before a block goes back."""
        found = self._state(alive)
        found["working"] = self.hidden + np.maximum(self.piece, self.copied) + self.width * self.words * (self.stage == 3)
        return _where(self.too_large & ~self.once & (self.alone * alive.top * alive.chunk > 0), found)

    def closing(self, alive: Alive) -> Parts:
        """A chunk has gone back, and its last gradients go to the other ranks; the embedding's is the very last."""
        w, words = self.width, self.words
        found = self._state(replace(alive, summed=np.maximum(alive.summed, alive.chunk > 0)), closing=True)
        found["activations"] = found["activations"] - alive.chunk * self.kept
        first = alive.top * self.alone * words
        all_of_it = alive.chunk * self.block + first * (1.0 - self.too_large)
        rest = np.where(all_of_it > self.bucket, all_of_it % self.filled, all_of_it) + alive.bottom * self.shape.embed_whole
        owned = (self.shards == 1) | (alive.bottom > 0) | (alive.behind == 0)  # by some rank, of a first or last chunk
        mine = (alive.chunk > 0) * owned * self.part
        with_head = (first > 0) & ~self.too_large & (all_of_it <= self.bucket)
        before = self._copies(rest, mine=np.where(with_head, np.maximum(mine, self.share), mine), largest=self.largest)
        piece = np.maximum(self.piece, self.copied - (1.0 - alive.ended) * self.sum_ends)  # copied before sums are made
        before = np.where((first > 0) & self.too_large & (alive.chunk == 0), w * words - self.held_on + piece, before)  # a head alone
        after = np.maximum(before, self._copies(words, mine=self.share, largest=words) - w * words)
        both = self._copies(rest + words, mine=np.maximum(mine, self.share), largest=words)
        together = both - w * words  # its gradient moves into the bucket
        last = np.select([self.once, self.too_large, rest + words > self.bucket], [0.0, np.maximum(before, piece), after], together)
        # the head's gradient has waited for the embedding's, and they are added up
        own = np.where(self.both > 0, np.maximum(2 * w * words, last), w * words + last)
        # a gradient for the stage before; what was before the embedding's is let go of with it
        onward = np.where(alive.bottom > 0, self.sending, self.hidden)
        found["working"] = onward + np.where(alive.bottom > 0, own, before)
        return found


def _where(there: Array, found: Parts) -> Parts:
    """Never the fullest where there is no such moment."""
    return {**found, "activations": np.where(there, found["activations"], -np.inf)}
