"""What the parts of a rank of our engine weigh, whatever the moment: its weights, what a microbatch leaves behind, what is on its way, what
ZeRO holds.

In: a shape, layouts with their stage splits, a runtime.  Out: `Sizes`, whose arrays are (kinds, n) or broadcast to it. account.py says what
of it is there when.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalite.tune.kept import SELECTIVE, block_kept, parameters
from megalite.tune.layouts import Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Number, Shape, ceil
from megalite.tune.splits import INTERLEAVED, Split
from megalite.tune.turns import Alive

Parts = dict[str, Array]
NEAR = 1e-3  # of a block, where numbers of elements are compared: norms and biases are in blocks and in no matrix


class Sizes:
    """Of every kind of rank of every layout; bytes where they are not called elements."""

    def __init__(self, shape: Shape, layouts: Layouts, split: Split, runtime: Runtime, alive: dict[str, Alive]) -> None:
        self.shape, self.layouts, self.split, self.width = shape, layouts, split, runtime.width
        self.offload, self.shards = layouts.offload, layouts.shards.astype(float)
        self.once, self.state = layouts.once, alive
        self.selective = layouts.recompute == SELECTIVE
        self._weigh(layouts.tp)
        self.kept, self.computed = block_kept(shape, layouts, runtime)
        self._keep(layouts.tp)
        self._pass()
        self.always = self._always(runtime)
        self._choose()
        self._reduce()
        self._halve()
        self.at_turn, self.at_deep, self.at_end = (
            self.gathered(alive[name], turn=name == "turn", closing=name == "end") for name in ("turn", "deep", "end")
        )

    def _weigh(self, t: Array) -> None:
        """Elements of weights."""
        shape, split = self.shape, self.split
        self.every = parameters(shape, self.layouts, split)
        self.own = self.every / self.shards
        self.block, self.words = _floats(shape.block_cut(t) + shape.block_whole), _floats(shape.vocab_weight(t))
        self.both = split.embed * split.head * shape.tied  # one weight, whose gradient waits until both have gone back
        self.alone = 1.0 - self.both
        self.f, self.wide = ceil(shape.mlp, t), np.where(shape.gated, 2, 1) * ceil(shape.mlp, t)
        self.heads, self.columns = ceil(shape.heads, t) * shape.head_width, shape.columns(t)
        self.matrices = [_floats(shape.width * n) for n in (self.f, self.wide, self.heads, self.columns)]  # the last one first
        self.largest = np.maximum(self.matrices[0], self.matrices[1])
        self.bucket = _floats(self.layouts.bucket)

    def _keep(self, t: Array) -> None:
        """What a microbatch leaves behind: a hidden state, whole and as the rank has it; a block; the head's norm and logits."""
        shape, layouts, w = self.shape, self.layouts, self.width
        self.row = w * (layouts.micro * shape.sequence / layouts.cp)  # an element of every token
        self.whole = self.row * shape.width
        self.cut = layouts.split_sequence == 1
        self.hidden = self.whole / np.where(self.cut, t, 1)
        self.mlp = self.hidden + self.row * np.where(shape.gated, 4, 2) * self.f  # of it, behind the second norm
        words = ceil(shape.vocab, t)
        pieces = shape.pieces
        if pieces == 1:  # the head's products are padded, see kernels/cross_entropy.py
            self.padded = np.ceil(words / 64) * 64 / words
            self.head = self.whole + self.row * words * self.padded
        else:  # no logits are kept, but three numbers a token; the last piece is the largest
            self.padded = np.ones_like(words, dtype=float)
            unit = np.where(words >= pieces * 64, 64, 1)
            last = words - words * (pieces - 1) // pieces // unit * unit
            self.piece, self.piece_copied = np.ceil(last / 64) * 64, last % 64 > 0  # words
            self.head = self.whole + 12.0 / w * self.row
        # of BERT's also the product before it and its GELU, which the norm saves; and what a norm saves at the end of an embedding or block
        self.bert = bool(np.any(shape.bert))
        bert = 1.0 * np.asarray(shape.bert)
        self.head = self.head + 2.0 * bert * self.hidden
        self.waits = w * self.words * self.both * self.padded  # the head's gradient for the embedding's, if they are one weight
        # a row's gradient, which is not that of the sum behind it; where sequences are split, it is let go when it has been gathered
        self.dropped = self.hidden * (np.asarray(shape.dropout) & ~self.cut)
        self.normed = bert * (self.hidden + 8.0 * self.row / w / np.where(self.cut, t, 1))

    def _pass(self) -> None:
        """What is on its way between stages, and between the products of a block that goes back."""
        layouts, w, t = self.layouts, self.width, self.layouts.tp
        gathered = np.where(self.cut, self.whole, 0.0)  # the gradient of a sum that was scattered, until its product has gone back
        # gradients of the last product's input and weight; then of what it was made of
        self.first, second = gathered + self.row * self.f + w * self.matrices[0], self.row * self.wide
        self.first = self.first + self.dropped
        # the product before it. Where sequences are split: its input whole, that one's gradient twice, and its part.
        # Else the gradient that is summed over ranks, and its sum, while the MLP has let go
        third = np.where(self.cut, 3 * gathered + self.hidden - second, (t > 1) * (2 * self.whole - self.mlp))
        self.after = np.maximum(second, third)
        # the last product of a block on its way forward, and its sum, or what is scattered of it; only where schedules are interleaved has
        # a place been made for the gradient of what it puts out
        forth = np.where(self.cut, 2 * self.whole, (t > 1) * self.whole) - self.hidden * (layouts.schedule != INTERLEAVED)
        self.forth = (self.computed + forth) * (layouts.recompute < 2)
        # computed again, queries, keys and values on their way to other ranks: side by side, by rank, and as they arrive
        exchanged = (layouts.cp > 1) & self.selective
        self.exchanged = np.where(exchanged, gathered + self.hidden + 3.0 * self.row * self.columns, 0.0)

    def _always(self, runtime: Runtime) -> Parts:
        """What lies there for the whole run."""
        w, three, layouts = self.width, self.layouts.stage == 3, self.layouts
        # ids, targets and what these count, of this rank's part of each sequence, and the whole they were taken from; BERT's segments or
        # the documents and their positions, and the spans that attention sees
        more = 1.0 * (np.asarray(self.shape.bert) | np.asarray(self.shape.documents))
        each = 16.0 + 24.0 * more + (20.0 + 8.0 * more) / layouts.cp
        batch = layouts.microbatches * layouts.micro * self.shape.sequence * each
        return {
            "weights": w * np.where(three, self.own * (self.offload < 2), self.every),
            "optimizer": runtime.state_bytes * self.own * (self.offload < 1),
            "gradients": 4.0 * np.where(self.once, self.every, self.own * (self.offload < 1)),
            "buckets": 0.0 * self.own,
            "runtime": np.full_like(self.own, runtime.memory.context),
            "batch": batch + 0.0 * self.own,
        }

    def _choose(self) -> None:
        """Elements that ZeRO-3 keeps for a whole step, and how many it fetches ahead of their use: parallel/gather.py, `choose`."""
        live, split = self.layouts.live.astype(float), self.split
        self.stay = self.every <= live
        self.own_head = head = self.alone * split.head * self.words  # tied to an embedding that is there too, it comes first and not last
        self.up_to = np.cumsum([np.broadcast_to(matrix, self.words.shape) for matrix in self.matrices], axis=0, dtype=np.float32)
        down, up, out, columns = self.matrices
        again = self.layouts.recompute > 0
        self.in_order = [down, np.where(again, columns, up), out, np.where(again, up, columns)]
        self.all_blocks = split.blocks * self.block
        least = np.maximum(split.embed * self.words, self.largest)
        room = live - self.bucket - least
        none = (room < head) | (live < self.bucket + np.maximum(least, head))
        self.lasting = np.where(none, 0.0, self.fill(head, room))
        self.ahead = np.where(none, np.maximum(np.minimum(self.bucket, live - np.maximum(least, head)), 0.0), self.bucket)
        # where there is room for the others, all have been fetched and none goes any more
        self.fetched = self.all_blocks + head - self.lasting - self.largest <= self.ahead
        moved = (self.layouts.stage == 3) & ((self.shards > 1) | (self.offload == 2))  # one rank has them whole, unless the host has
        self.gathers = self.width * moved

    def gathered(self, alive: Alive, *, turn: bool = False, closing: bool = False) -> Array:
        """Bytes of weights that ZeRO-3 holds beside its shard: what lasts, what is at work, and what comes next on the way back."""
        head = self.own_head * (self.lasting > 0)
        lasting = np.maximum(self.lasting - head - alive.behind * self.block, 0.0)  # of the chunk that goes back, and of those before it
        part = lasting - np.floor(lasting / self.block + NEAR) * self.block
        there = [part > self.block * -NEAR + before for before in self.up_to]
        working: Any = 0.0
        if turn:
            working = (head == 0) * self.words * alive.top
        elif not closing:
            working = (lasting < self.matrices[0]) * self.matrices[0]
            there[0] = there[0] | (working > 0)
        left = np.maximum(alive.chunk - 1.0 + turn, 0.0) * (not closing)  # blocks of the chunk that follow
        forward = (alive.next_forward > 0) & (lasting == 0)
        come = self._ahead(there, left, forward, alive.next_forward > 1, closing=closing)
        rest = self.all_blocks + head - self.lasting
        if not turn:
            come = np.where(self.fetched, rest, come)  # what is at work is not counted as ahead
        come = np.minimum(come, rest - (0.0 if turn else working))
        if closing:  # the embedding is next, if a forward pass is, or nothing
            chunked = self.layouts.several
            embedding = np.where(chunked, alive.next_forward > 1, (alive.summed > 0) & (alive.bottom > 0)) & (self.words > self.ahead)
            come = come * ~(embedding | (self.layouts.microbatches * self.layouts.chunks == 1))
        return self.gathers * np.where(self.stay, self.every, self.lasting + working + come)

    def _ahead(self, there: list[Array], left: Array, forward: Array, embedding: Array, *, closing: bool) -> Array:
        """Elements that are fetched ahead: weights in the order of their use, until one does not fit.

        Of the block that goes back what is not `there`, the blocks that are `left` of its chunk, and what comes behind the chunk: blocks on
        their way back, or where it is computed again forward to its last matrix; all the way `forward` where a chunk goes forward next,
        which may begin with the embedding.
        """
        come, more = np.zeros_like(self.ahead), np.ones_like(self.stay)

        def fetch(size: Array) -> None:
            nonlocal come, more
            more = more & (come + size <= self.ahead)
            come = come + size * more

        for number, (matrix, other) in enumerate(zip(self.in_order, (0, 3, 2, 1), strict=True)):
            known = there[number] if number in (0, 2) else np.where(self.layouts.recompute > 0, there[other], there[number])
            fetch(np.where(forward, self.matrices[3 - number], matrix * ~known) if closing else matrix * ~known)
        blocks = np.floor((self.ahead - come) / self.block) * more
        beyond = forward & (blocks >= left)
        shut = beyond & embedding & (come + left * self.block + self.words > self.ahead)
        come = come + np.where(shut, left, blocks) * self.block * more
        more = more & ~shut
        for matrix, forth in zip(self.in_order[:3], self.matrices[:0:-1], strict=True):
            fetch(np.where(beyond, forth, matrix))
        return come

    def fill(self, first: Array, elements: Array) -> Array:
        """Elements of `first` and of what fits behind it into so many: whole blocks, and whole matrices of the next one."""
        rest = np.maximum(elements - first, 0.0)
        blocks = np.floor(rest / self.block) * self.block
        rest, before, filled = rest - blocks, np.zeros_like(rest), first + blocks
        for matrix in self.matrices[:-1]:
            before = before + matrix
            filled = filled + matrix * (rest >= before)
        return filled

    def _reduce(self) -> None:
        """Buckets, where gradients travel after every microbatch: whole layers, the last ones first, as many as fit; of a larger block each
        matrix alone, as it is. An embedding and a head are layers, too, and alone where they are tied (optim.py, `runs`).
        """
        self.moved = ~(self.once | ((self.shards == 1) & (self.offload < 1))) * self.width  # bytes an element
        self.dense = np.add.reduce(self.matrices)
        self.per = np.floor(self.bucket / self.dense)  # blocks in one
        self.large = self.per == 0
        split, self.untied = self.split, 1.0 - np.asarray(self.shape.tied, dtype=float)
        self.beside = self.untied * np.floor(np.maximum(self.bucket - self.words, 0.0) / self.dense)  # a head
        self.small = self.block - self.dense  # norms and biases, which travel together
        # BERT's matrices that no head of GPT has, with the tables beside the embedding of words, if that is there
        shape, both = self.shape, split.embed * split.head
        d = shape.width * np.asarray(shape.bert)
        pairs, tables = 2.0 * d * (d + 1), d * (shape.positions + 2.0)
        self.joined = both * (pairs + tables <= self.bucket)
        self.pairs = np.where(pairs <= self.bucket, pairs + self.joined * tables, d * d)
        # of a weight that is gathered and may go
        self.goes = self.gathers * self.matrices[0] * ((self.lasting < self.matrices[0]) & ~self.stay & ~self.fetched)
        # what came of an element, on its way to the host, and from the second microbatch on the sum that it is added to
        self.copied = np.where(self.offload >= 1, 4.0 / self.shards, 0.0) * (self.moved > 0) * (1 + (self.layouts.microbatches > 1))

    def _halve(self) -> None:
        """Seven digits of a number of bytes are enough, and a layout costs an eighth less."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and value.dtype == float:
                setattr(self, name, value.astype(np.float32))
        self.matrices, self.in_order = ([matrix.astype(np.float32) for matrix in each] for each in (self.matrices, self.in_order))
        self.always = {name: size.astype(np.float32) for name, size in self.always.items()}


def _floats(value: Number) -> Array:
    return np.asarray(value, dtype=float)
