"""How much memory a rank needs at its fullest, as a waterfall: what lies there for the whole run, and what comes and goes.

In: a shape, layouts with their stage splits, a runtime.  Out: bytes by part, of the fullest rank of each layout, and what the host holds.
The account is that of our engine: DeepSpeed's flat buffers and buckets (parallel/zero.py), the tensors that autograd keeps for each block
(models/layers.py), one set a microbatch in flight. A step has three moments that can be its fullest, and building the engine one:

    turn      all activations are there and the head goes back: logits, and over them their gradient
    deep      the first block that goes back, with its gradients and buckets
    update    activations are gone, the optimizer needs room for its arithmetic

Other runtimes differ in `Account` (bytes a parameter) and in fitted factors. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054; activations:
counted as Korthikanti et al. 2022, arXiv:2205.05198, section 4, for fused attention and this house's blocks.
"""

from __future__ import annotations

import numpy as np

from megalite.tune.layouts import RECOMPUTE, Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Number, Shape, ceil
from megalite.tune.splits import INTERLEAVED, Split, flying

PARTS = ("weights", "gathered", "optimizer", "gradients", "buckets", "activations", "working", "batch", "runtime")
MOMENTS = ("start-up", "turn", "deep", "update")
FULL, SELECTIVE = RECOMPUTE.index("full"), RECOMPUTE.index("selective")


def waterfall(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> dict[str, Array]:
    """Bytes by the names of PARTS at the fullest moment of the fullest rank; their sum is the peak. `moment` indexes MOMENTS, `rank` the
    split."""
    wide = _Wide(shape, layouts, split, runtime)
    moments = [wide.start_up(), wide.turn(), wide.deep(), wide.update()]
    totals = np.stack([sum(parts.values()) for parts in moments])  # (moments, n, kinds)
    highest = totals.max(axis=0)
    rank = highest.argmax(axis=1)
    rows = np.arange(len(layouts))
    moment = totals[:, rows, rank].argmax(axis=0)
    found = {name: np.choose(moment, [_of_rank(parts[name], rows, rank) for parts in moments]) for name in PARTS}
    return {**found, "moment": moment, "rank": rank}


def _of_rank(values: Array, rows: Array, rank: Array) -> Array:
    return values[:, 0] if values.shape[1] == 1 else values[rows, rank]


def peak(parts: dict[str, Array]) -> Array:
    return sum(parts[name] for name in PARTS)  # type: ignore[return-value]


def host(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Array:
    """Bytes of host memory a rank needs: what is offloaded, and while building one layer of the model in fp32."""
    own = _parameters(shape, layouts, split).max(axis=1) / layouts.shards
    offloaded = np.where(layouts.offload >= 1, 16.0 * own, 0.0) + np.where(layouts.offload == 2, runtime.width * own, 0.0)
    layer = 4.0 * np.maximum(shape.block_cut(1) + shape.block_whole, shape.vocab_weight())
    return offloaded + 2 * layer


def block_kept(shape: Shape, layouts: Layouts, runtime: Runtime) -> tuple[Array, Array]:
    """Bytes that autograd keeps of one block for one microbatch, and what is computed again when it goes back."""
    t, w, c = layouts.tp, runtime.width, runtime.memory
    tokens = layouts.micro * shape.sequence / layouts.cp
    d, f, k = shape.width, ceil(shape.mlp, t), shape.head_width
    share = np.where(layouts.split_sequence == 1, t, 1)
    columns, keys = shape.columns(t), ceil(shape.kv_heads, t) * k
    mixed = ceil(shape.heads, t) * k
    rotated = np.where(shape.rope, columns - keys, 0)
    exchanged = np.where(layouts.cp > 1, mixed, 0)  # queries, keys and values are kept behind their exchange, and no longer before it
    activation = np.where(shape.gated, 4, 2) * f
    turned = np.where(shape.rope, 8.0 * shape.sequence * k, 0.0)  # cosines and sines, for queries and for keys
    rows = 4.0 * ceil(shape.heads, t) + 4 * 4.0 / share  # one number a row of attention, two a norm
    narrow = 4.0 * d / share + c.uncut * d + columns + rotated + mixed + exchanged
    whole = tokens * (w * (c.linear * narrow + c.widening * activation) + rows) + turned
    if not runtime.flash:
        heads = ceil(shape.heads, t) * layouts.micro * 1.0 * shape.sequence**2
        whole = whole + heads * (2 * w + 1)  # scores before and after dropout, and its mask
    products = np.where(t > 1, 2.0 * d, 0)  # before they are summed over ranks; they are whole, their sums may be cut
    exchanges = np.where(layouts.cp > 1, columns + mixed, 0)
    attention = mixed + 4.0 / w * ceil(shape.heads, t)  # what it puts out, and a number in fp32 for every row
    dear = tokens * w * (d / share + columns + attention + products + 2.0 * d / share + shape.ups * f + exchanges)
    entry = tokens * w * d / share
    kept = np.select([layouts.recompute == FULL, layouts.recompute == SELECTIVE], [entry + 0 * whole, dear], whole)
    # norms, their sum, GELU; what attention's projection gave is added to the block's input and let go, as is what has been exchanged
    passed = d / share + np.where(t > 1, d, 0) + exchanged / np.maximum(mixed, 1) * columns if runtime.name == "megalite" else 0.0
    cheap = tokens * (w * (3.0 * d / share + rotated + activation - shape.ups * f - passed) + 4 * 4.0 / share) + turned
    again = np.select([layouts.recompute == FULL, layouts.recompute == SELECTIVE], [whole - kept, cheap], 0.0)
    return kept, again


def _parameters(shape: Shape, layouts: Layouts, split: Split) -> Array:
    """Of every kind of rank, after tensor parallelism, (n, kinds)."""
    t = layouts.tp
    block = np.asarray(shape.block_cut(t) + shape.block_whole, dtype=float)
    ends = split.embed * _column(shape.embed_cut(t) + shape.embed_whole) + split.head * _column(shape.head_cut(t) + shape.head_whole)
    shared = split.embed * split.head * _column(np.where(shape.tied, shape.vocab_weight(t), 0))
    return split.blocks * block[:, None] + ends - shared


class _Wide:
    """The account of every kind of rank of every layout, (n, kinds)."""

    def __init__(self, shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> None:
        self.shape, self.layouts, self.split, self.runtime = shape, layouts, split, runtime
        t = layouts.tp
        self.vocabulary_weight = _column(shape.vocab_weight(t))
        whole = np.ceil(ceil(shape.vocab, t) / 64) * 64  # words: the head's products are padded, see kernels/cross_entropy.py
        self.padded = _column(whole / ceil(shape.vocab, t))
        self.padding = self.padded > 1  # then the weight is there once more
        self.block = np.asarray(shape.block_cut(t) + shape.block_whole, dtype=float)
        self.parameters = _parameters(shape, layouts, split)
        self.shards = layouts.shards[:, None].astype(float)
        self.own = self.parameters / self.shards
        self.stage, self.offload = layouts.stage[:, None], layouts.offload[:, None]
        tokens = layouts.micro * shape.sequence / layouts.cp
        kept, again = block_kept(shape, layouts, runtime)
        held = flying(layouts, split)
        hidden = tokens * np.asarray(shape.width) / np.where(layouts.split_sequence == 1, t, 1) * runtime.width
        self.hidden = hidden[:, None]
        vocabulary = split.head * (tokens * ceil(shape.vocab, t))[:, None]
        ours = runtime.name == "megalite"
        # 1F1B with chunks goes back through the head at once
        heads = np.where(layouts.schedule[:, None] == INTERLEAVED, 1, np.minimum(held.turn_chunks, layouts.microbatches[:, None]))
        whole_sequences = np.asarray(shape.width) * tokens * runtime.width
        self.normed = np.where(layouts.split_sequence == 1, whole_sequences, hidden)[:, None]
        head = split.head * self.normed + runtime.width * vocabulary * self.padded * ours  # logits are kept
        # a stage keeps what it puts out, too; the head, its norm's result
        self.turning = held.turn_blocks * kept[:, None] + held.turn_chunks * self.hidden + heads * head
        # one head has gone back
        self.deepest = held.deep_blocks * kept[:, None] + (held.deep_chunks - split.head * ours) * self.hidden + (heads - 1) * head
        self.again = again[:, None] * (split.blocks > 0)
        self.logits = vocabulary
        self.passing = runtime.memory.passing * (tokens * np.asarray(shape.width) * runtime.width)[:, None]
        # a gradient on its way, or at the end of a pipeline the next microbatch, unless all are there
        self.steady = held.turn_chunks < (layouts.microbatches * layouts.chunks)[:, None]  # gradients have come before
        more = (layouts.pp > 1)[:, None] & self.steady
        self.received = np.where(more | (split.head == 0), self.hidden, 0.0)
        sending = (layouts.schedule == 0) & (t > 1) & (layouts.pp > 1) & (layouts.microbatches > 1)  # the gradient before, still
        self.sent = np.where(sending[:, None] & (split.head > 0), self.hidden, 0.0)
        wide = np.where(shape.gated, 2, 1) * ceil(shape.mlp, t)
        self.summed = 4.0 * (np.asarray(shape.width) * wide)[:, None] * ours  # the largest gradient on its way into its sum
        heads_wide = ceil(shape.heads, t) * shape.head_width
        weights = (ceil(shape.mlp, t), wide, heads_wide, shape.columns(t))
        self.matrices = [np.broadcast_to(np.asarray(shape.width * n, dtype=float), t.shape) for n in weights]  # the last one first
        self.around: Array | None = None
        w, f, d = runtime.width, ceil(shape.mlp, t), np.asarray(shape.width)
        gathered = w * np.where(layouts.split_sequence == 1, tokens * shape.width, 0.0)  # the gradient of a sum that was scattered
        self.going = w * (tokens * wide + d * f)[:, None] + gathered[:, None] + 2 * self.hidden
        # gradients of the last product's input and weight, then of what it was made of
        self.first, self.second = w * (tokens * f + d * f)[:, None], w * (tokens * wide)[:, None]
        twice = more & (split.head == 0) & (layouts.schedule != INTERLEAVED)[:, None]  # an output is still being sent
        self.coming = gathered[:, None] + np.where(twice, 2, 1) * self.hidden
        # computed again, queries, keys and values on their way to other ranks: side by side, by rank, and as they arrive
        self.exchanged = ((layouts.cp > 1) * (layouts.recompute == SELECTIVE) * (hidden + 3.0 * w * tokens * shape.columns(t)))[:, None]
        # at the end of a first stage: the blocks have let go, the embedding has its gradient, and that one or theirs are on the way
        chunk, bucket = split.blocks / layouts.chunks[:, None], layouts.bucket[:, None].astype(float)
        apart = np.where((self.stage % 3 > 0) & (self.shards > 2), w * np.minimum(bucket, 2 * self.vocabulary_weight / self.shards), 0.0)
        blocks = chunk * self.block[:, None]
        theirs = np.where(blocks > bucket, blocks % bucket, blocks) * (4.0 / self.shards + w) * (self.stage == 3)
        sums = np.maximum(theirs, 4.0 * self.vocabulary_weight / np.where(self.stage == 0, 1.0, self.shards) + apart)
        self.embedding = split.embed * (w * self.vocabulary_weight + sums + self.hidden - chunk * kept[:, None])
        self.gone = chunk * kept[:, None] + self.hidden  # what a chunk lets go of that has gone back
        # where sequences are split, the product before: its input whole, that one's gradient twice, its part and the one that came
        self.third = np.where(gathered > 0, 2 * gathered + 2 * hidden, 0.0)[:, None] - self.second
        # autograd holds the gradient of a tied head until the embedding has gone back
        self.waiting = w * split.embed * split.head * _column(np.where(shape.tied, shape.vocab_weight(t), 0.0)) * self.padded

    def persistent(self) -> dict[str, Array]:
        """What lies there all the time."""
        r, w = self.runtime, self.runtime.width
        three = self.stage == 3
        weights = np.where(three, np.where(self.offload == 2, 0.0, w * self.own), w * self.parameters)
        states = np.where(self.offload >= 1, 0.0, r.state_bytes * self.own)
        if r.name == "megalite":
            # the largest gradient, from where it leaves for the host
            landing = w * np.maximum((self.split.embed + self.split.head > 0) * self.vocabulary_weight, self.summed / 4.0)
            resident = np.where(three, 4.0 * self.own * (self.offload == 0), landing * (self.offload >= 1))
        else:
            resident = r.memory.gradient * 4.0 * self._summed()
        context = np.full_like(self.own, r.memory.context)
        batch = np.broadcast_to((self.layouts.microbatches * self.layouts.micro * self.shape.sequence)[:, None] * 36.0, self.own.shape)
        return {"weights": weights, "optimizer": states, "gradients": resident, "runtime": context, "batch": batch * (r.name == "megalite")}

    def _summed(self) -> Array:
        """Elements of the gradients' sums on a rank."""
        sharded = self.stage >= (2 if self.runtime.name != "fsdp" else 1)
        return np.where(sharded, self.own, self.parameters)

    def _blank(self) -> dict[str, Array]:
        return {**dict.fromkeys(PARTS, np.zeros_like(self.own)), **self.persistent()}

    def _gathered(self, *, turn: bool) -> Array:
        """Weights that ZeRO-3 holds beside its shard: all, where that many may stay (parallel/gather.py), and else as many as may: what is
        not kept, for it is needed again soon, is fetched ahead. At least the matrix at work; above the limit modules let go of theirs.
        """
        if self.around is None:
            self.around = np.zeros_like(self.own)
            rows = self.layouts.stage == 3
            live = self.layouts.live[rows][:, None].astype(float)
            head = (self.split.head * self.vocabulary_weight)[rows]
            first = np.where(head > 0, head, self.matrices[0][rows, None])
            passing = np.where(first <= live, self._reach(live, rows, head), 0.0)
            self.around[rows] = np.where(self.parameters[rows] <= live, self.parameters[rows], passing)
        at_work = self.split.head * self.vocabulary_weight if turn else np.maximum(self.matrices[0], self.matrices[1])[:, None]
        beside = 0.0 if turn else at_work * (self.around < self.parameters)  # fetched when it is needed, whatever was fetched ahead
        moved = (self.stage == 3) & ((self.shards > 1) | (self.offload == 2))  # one rank has them whole, unless the host has
        return self.runtime.width * moved * np.maximum(self.around + beside, at_work)

    def _reach(self, elements: Array, rows: Array, head: Array) -> Array:
        """The fewest elements, of whole matrices from a rank's last one on, that are so many."""
        block = self.block[rows][:, None]
        rest = np.maximum(elements - head, 0.0)
        blocks = np.floor(rest / block)
        rest -= blocks * block
        part, before = np.zeros_like(rest), 0.0
        for matrix in (matrix[rows][:, None] for matrix in self.matrices):
            part += np.where(rest > before, matrix, 0.0)
            before = before + matrix
        return np.minimum(head + blocks * block + part, self.parameters[rows])

    def _buckets(self) -> Array:
        if self.runtime.name != "megalite":
            return np.zeros_like(self.own)
        bucket = self.layouts.bucket[:, None].astype(float)
        return self.runtime.width * bucket * np.where((self.stage == 2) | (self.stage == 1), 2, 1)  # two where they overlap

    def _accumulated(self) -> Array:
        """Gradients' sums in fp32 that ZeRO-0 to 2 make anew in every step. Offloaded ones pass through such sums where they are sharded,
        from the first reduction on: with as many microbatches in flight they are there if a step has more than a rank holds at once.
        """
        if self.runtime.name != "megalite":
            return np.zeros_like(self.own)
        num, schedule = self.layouts.microbatches[:, None], self.layouts.schedule[:, None]
        one = np.where(schedule == 0, num > self.layouts.pp[:, None] - self.split.place, (schedule == INTERLEAVED) & (num > 1))
        return np.where((self.stage < 3) & ((self.offload == 0) | (one & (self.shards > 1))), 4.0 * self.own, 0.0)

    def start_up(self) -> dict[str, Array]:
        """The engine is built, layer by layer: no more than what stays, but without a batch."""
        found = self._blank()
        found["buckets"] = self._buckets() * (self.stage == 3)
        found["batch"] = np.zeros_like(self.own)
        return found

    def turn(self) -> dict[str, Array]:
        found = self._blank()
        w, c = self.runtime.width, self.runtime.memory
        found["activations"] = self.turning + self.received + self.sent
        if self.runtime.name == "megalite":
            # the gradients of the head's weight and input, and the padded weight
            found["working"] = self.split.head * (w * self.vocabulary_weight * self.padded * (1 + self.padding) + self.normed)
        else:
            found["working"] = self.logits * (12.0 + 4.0 * (self.layouts.microbatches > 1)[:, None]) * c.logits + self.passing
        found["gathered"] = self._gathered(turn=True)
        breadth = np.isin(self.layouts.schedule, (1, 3))  # all forwards first
        first = ((self.layouts.microbatches > 1) & ~breadth)[:, None]  # sums of the microbatch before are there
        found["buckets"] = self._buckets() * (self.stage == 3)
        # 1F1B with chunks turns again before anything but the head has gone back
        share = np.where(self.layouts.schedule[:, None] == INTERLEAVED, self.split.head * self.vocabulary_weight / self.parameters, 1.0)
        found["gradients"] = found["gradients"] + self._accumulated() * first * share
        return found

    def deep(self) -> dict[str, Array]:
        found = self._blank()
        found["activations"] = self.deepest + self.received
        found["gathered"] = self._gathered(turn=False)
        found["buckets"] = self._buckets()
        if self.runtime.name == "megalite":
            # made when a backward pass has its first gradient: of the head's norm, of BERT's, or of a bias that is added after a sum
            shape = self.shape
            before = (self.split.head > 0) | _column(
                (self.layouts.tp > 1) & np.asarray(shape.bias, bool) | np.asarray(shape.bert, bool)
            ).astype(bool)
            late = np.where((self.stage < 3) & ~before, found["buckets"], 0.0)
            sums = self._accumulated()
            deep = self.again + np.maximum(np.maximum(self.first - late, self.second), self.third)
            deep = self.coming + np.maximum(deep, self.exchanged - late)
            # the first chunk that goes back finds no sums, the next one has a chunk less before it
            first = ~self.steady & (sums < self.gone)
            there = np.where(first | (self.layouts.microbatches * self.layouts.chunks == 1)[:, None], 0.0, sums)
            found["activations"] = found["activations"] - np.where(self.steady | first, 0.0, self.gone)
            found["working"] = np.maximum(deep, self.embedding + sums - there)
            found["gradients"] = found["gradients"] + self.waiting + there
        else:
            found["working"] = self.passing + self.again + self.going
            found["gradients"] = found["gradients"] + self.runtime.memory.fresh * self.parameters + self._accumulated()
        return found

    def update(self) -> dict[str, Array]:
        found = self._blank()
        ours = self.runtime.name == "megalite"
        found["gradients"] = found["gradients"] + self._accumulated()
        c = self.runtime.memory
        if not ours:  # DeepSpeed's sums are flat already, and the fused update works in place
            found["working"] = np.where(self.offload == 0, c.update * self.own + c.exchange * self.parameters, 0.0)
        found["buckets"] = self._buckets() * (self.stage == 3)
        return found


def _column(value: Number) -> Array:
    return np.asarray(value, dtype=float)[..., None]
