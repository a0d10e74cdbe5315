"""The account of our engine's memory, at the moments of memory.py: DeepSpeed's flat buffers (parallel/zero.py), gradients on their way
(parallel/sums.py), the tensors that autograd keeps of each block (models/layers.py), and what the schedule holds (parallel/pipeline.py).

In: a shape, layouts with their stage splits, a runtime.  Out: bytes by part, moment by moment, for every kind of rank, (kinds, n). Read off
the dry run operator by operator; tests/ranks/test_closed_form.py holds the two together.

Gradients come in the order of the backward pass: the head's weight, then block by block those of the MLP's second and first product, of
attention's projection and of queries, keys and values; the embedding's last. Where they travel after every microbatch they fill buckets:
one is on its way to the other ranks while the next is filled. Else each is added to whole sums, which are there all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from megalite.tune.layouts import Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.sizes import Parts, Sizes
from megalite.tune.splits import Split, flying
from megalite.tune.turns import Alive

Moment = tuple[str, Parts, Array]


def moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[Moment]:
    """Each moment's name, its bytes by part, and their sum, which is never the largest where there is no such moment."""
    alive = flying(layouts, split)
    account = Account(shape, layouts, split, runtime, alive)
    yield account.start()
    yield account.turn(alive["turn"])
    chunked = layouts.several.any()  # else the states are all one
    for state in ("deep", "next")[: 1 + chunked]:
        yield from account.blocks(alive[state])
    for state in ("deep", "end")[: 1 + chunked]:
        yield account.closing(alive[state])


class Account(Sizes):
    """Of every kind of rank of every layout."""

    def start(self) -> Moment:
        """When the engine is built."""
        nothing = {**self.always, "batch": np.zeros_like(self.own)}
        return "start-up", nothing, total(nothing)

    def held(self, alive: Alive, *, turn: bool = False, closing: bool = False) -> Parts:
        """What is there beside what is at work."""
        found = dict(self.always)
        top: Any = 0.0 if turn else alive.top  # the head has gone back
        gone = top * alive.bottom if closing else top  # what the head was made of; but what a chunk received stays until its end
        kept = alive.blocks * self.kept + (alive.units + alive.waiting - gone) * self.hidden + (alive.heads - top) * self.head
        if self.bert:
            found["buckets"] = found["buckets"] + top * self.moved * self.joined * self.pairs
            kept = kept + (alive.embeds - closing * alive.bottom) * self.normed
        found["activations"] = kept
        if turn:
            found["gathered"] = self.at_turn
            return found
        found["gathered"] = self.at_end if closing else self.at_deep
        found["gradients"] = found["gradients"] + self.waits
        return found

    def turn(self, alive: Alive) -> Moment:
        found = self.held(alive, turn=True)
        # the gradients of the head's weight and input, and the padded weight; of BERT's also that of its input by the pairs
        made = self.width * self.words * self.padded * (1 + (self.padded > 1)) + self.whole
        if self.shape.pieces > 1:  # the input's in fp32, the logits of a piece, what it adds to both, and its weight if that is padded
            made = made + 4 / self.width * self.whole + self.piece * self.row
            made = made + self.width * self.shape.width * self.piece * (1 + self.piece_copied)
        if self.bert:
            made = made + self.hidden * np.asarray(self.shape.bert)
            found["buckets"] = found["buckets"] + alive.top * self.moved * self.pairs
        found["working"] = alive.top * made
        return "turn", found, total(found)

    def _joins(self, alive: Alive, rest: Array) -> Array:
        """Elements of an embedding that shares the bucket of the last `rest` elements before it."""
        return alive.bottom * self.untied * self.words * (rest + self.words <= self.bucket) * ~self.large

    def _buckets(self, alive: Alive) -> tuple[Array, Array, Array]:
        """The blocks and the elements of the first bucket that has blocks, and those of a head that goes before."""
        joined = alive.top * (self.beside > 0)
        blocks = np.minimum(np.where(joined > 0, self.beside, self.per), alive.chunk)
        before = self.alone * (1 - joined) * self.words
        if self.bert:
            before = np.where(self.pairs > 0, self.pairs * (1 - self.joined), before)
        return blocks, self.dense * blocks + joined * self.words, alive.top * before

    def blocks(self, alive: Alive) -> Iterator[Moment]:
        """Of a chunk's last block on its way forward, and of those on their way back the first; the second, when the first bucket is there;
        the first and the second of the second bucket, while the first bucket is on its way; and its last, when what came of the first
        bucket goes to the host. Each when its last product's weight gradient is made, or put into a bucket.
        """
        state, one = self.held(alive), np.ones_like(alive.chunk)
        num, first, head = self._buckets(alive)
        rest = np.minimum(self.per, alive.chunk - num)
        second = self.dense * rest
        second = first + second + (num + rest == alive.chunk) * self._joins(alive, second)
        whole = first + (num == alive.chunk) * self._joins(alive, first)
        late = self.moved * whole * (1 - alive.top * (self.beside > 0))  # made with the first gradient
        product = np.maximum(self.computed + self.first, self.exchanged)
        # a weight's gradient is put into a bucket, or is on its way, when what it was made of is let go; then comes the next product, and
        # the weight may go, if the chunk is so large that it is not soon needed again
        goes = self.goes * (alive.chunk * self.block - self.matrices[0] > self.ahead)
        made = np.maximum(self.moved * self.matrices[0], self.after - goes + self.moved * self.large * self.matrices[0])
        # what may be fetched ahead ends with the blocks, where the embedding is next and does not fit
        ends = (alive.bottom > 0) & (alive.behind == 0) & (self.words > self.ahead) & ~self.fetched
        held, small = total(state), self.moved * alive.chunk * self.small

        def moment(name: str, there: Array, gone: Array, buckets: Array, working: Array) -> Moment:
            buckets = self.moved * buckets + small
            activations = state["activations"] - gone * self.kept
            parts = {**state, "activations": activations, "buckets": state["buckets"] + buckets, "working": working}
            left = self.gathers * (self.lasting + (alive.chunk - gone) * self.block)
            parts["gathered"] = np.where(ends, np.minimum(state["gathered"], left), state["gathered"])
            total = held - gone * self.kept + parts["gathered"] - state["gathered"] + buckets + working
            return name, parts, np.where(there, total, -np.inf)

        forth = {**state, "working": self.forth}
        yield "deep", forth, np.where((alive.chunk > 0) & (alive.top == 0), held + forth["working"], -np.inf)
        state["activations"], held = state["activations"] - self.normed, held - self.normed
        alone, travels = self.moved * head * self.large, (self.moved > 0) & ~self.large
        # behind the gradient of the first weight the head's arrives, for the host
        sent = alone * (1 + self.copied / self.width) + self.width * self.matrices[0]
        most = np.maximum(np.maximum(self.first - late + alone, made), sent * (alone > 0))
        work = np.maximum(self.computed + most, self.exchanged - late)
        # the gradient of what a stage put out, which is counted there, and is that of its last sum, unless a norm follows
        received = self.hidden * (alive.top == 0) * (self.normed == 0)
        work = self.hidden - received + work
        buckets = self.moved * (whole + head * ~self.large) + small
        parts = {**state, "buckets": state["buckets"] + buckets, "working": work}
        yield "deep", parts, np.where(alive.chunk > 0, held + buckets + work, -np.inf)
        product = self.hidden + product
        yield moment("deep", alive.chunk > 1, one, np.where(self.large, self.matrices[3], whole + head), product)
        yield moment("reduction", (num < alive.chunk) & travels, num, second, self.hidden + self.computed + made)
        yield moment("reduction", (num + 1 < alive.chunk) & (rest > 1) & travels, num + 1, second, product)
        if np.any(self.copied):
            both = np.where(self.large, self.matrices[2] + self.matrices[3], second)
            work = 2 * self.hidden + self.copied * np.where(self.large, self.matrices[2], first)
            yield moment("reduction", (num < alive.chunk) & (self.copied > 0), np.where(self.large, one, num + rest), both, work)

    def closing(self, alive: Alive) -> Moment:
        """A chunk has gone back, and its last gradients go to the other ranks; the embedding's is the very last."""
        w, words, moved = self.width, self.words, self.moved
        blocks, first, head = self._buckets(alive)
        rest = alive.chunk - blocks
        full = np.maximum(np.ceil(rest / np.maximum(self.per, 1.0)) - 1, 0.0)  # buckets between the first and the last
        last = np.where(rest > 0, self.dense * (rest - full * self.per), first)
        last = np.where(self.large, self.matrices[3] * (alive.chunk > 0), last)
        previous = np.select([rest == 0, full == 0], [head, first], self.dense * self.per)
        previous = np.where(self.large, np.where(alive.chunk > 0, self.matrices[2], head), previous)
        joins = self._joins(alive, last)
        last = last + joins
        own = w * words + np.where(joins > 0, moved * last, self.copied * words)
        own = np.where(self.both > 0, np.maximum(own, 2 * w * words), own)  # the head's has waited, and they are added up
        found = self.held(alive, closing=True)
        found["activations"] = found["activations"] - alive.chunk * self.kept
        found["buckets"] = found["buckets"] + moved * alive.chunk * self.small
        # the last bucket is full with the first block's product: its input is there, its gradient and that of what was added to it. The
        # bucket arrives with the next one, of biases, or of norms, when the one gradient is there that the block passes on. What a chunk
        # put out is there to the end; it is as large as what the first chunk was made of, which is gone then.
        hidden = self.hidden * (joins == 0)  # else the embedding has gone back before
        output = hidden * (1 - alive.top)
        after = hidden + np.where(alive.bottom > 0, 0.0, output)
        # where no norm comes before the product, only the sum of its input's gradient with that of what was added to it
        during = after + (self.normed == 0) * (hidden + np.where(alive.bottom > 0, hidden, 0.0))
        ended = np.maximum(
            moved * (last + previous) + self.copied * previous + during + alive.bottom * self.normed,
            moved * last + self.copied * last + np.where(self.shape.bias, during, after),  # an embedding's norm has gone back by then
        )
        found["working"] = np.where(alive.bottom > 0, np.maximum(own, ended), ended)
        return "end", found, total(found)


def total(parts: Parts) -> Array:
    return sum(parts.values())  # type: ignore[return-value]
