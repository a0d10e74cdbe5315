"""The account of other runtimes' memory, at the moments of memory.py: rougher than ours, with factors fitted to tables of their runs.

In: a shape, layouts with their stage splits, a runtime.  Out: bytes by part, moment by moment, for every kind of rank, (kinds, n).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megalite.tune.kept import block_kept, parameters
from megalite.tune.layouts import Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape, ceil
from megalite.tune.splits import Split, flying


def moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[tuple[str, dict[str, Array], Array]]:
    """Each moment's name, its bytes by part, and their sum."""
    for name, parts in _moments(shape, layouts, split, runtime):
        yield name, parts, sum(parts.values())  # type: ignore[misc]


def _moments(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Iterator[tuple[str, dict[str, Array]]]:
    c, w, t = runtime.memory, runtime.width, layouts.tp
    every = parameters(shape, layouts, split)
    own = every / layouts.shards
    summed = np.where(layouts.stage >= (1 if runtime.name == "fsdp" else 2), own, every)
    always = {
        "weights": w * np.where(layouts.stage == 3, own, every),
        "optimizer": np.where(layouts.offload >= 1, 0.0, runtime.state_bytes * own),
        "gradients": c.gradient * 4.0 * summed,
        "runtime": np.full_like(own, c.context),
    }
    yield "start-up", always

    alive = flying(layouts, split)
    turn, deep = alive["turn"], alive["deep"]
    tokens = layouts.micro * shape.sequence / layouts.cp
    kept, again = block_kept(shape, layouts, runtime)
    whole = w * (tokens * np.asarray(shape.width))
    hidden = whole / np.where(layouts.split_sequence == 1, t, 1)
    pipeline = layouts.pp > 1
    # a gradient on its way, or at the end of a pipeline the next microbatch; and with tensor parallelism the gradient before
    received = np.where(pipeline & (turn.summed > 0) | (split.head == 0), hidden, 0.0)
    sending = pipeline & (layouts.schedule == 0) & (t > 1) & (layouts.microbatches > 1) & (split.head > 0)
    # FSDP gathers the next block while one is at work
    two = np.maximum(2.0 * (shape.block_cut(t) + shape.block_whole), shape.vocab_weight(t))
    gathered = np.where(layouts.stage == 3, w * np.minimum(every, two), 0.0)
    words = split.head * (tokens * ceil(shape.vocab, t))
    besides = whole * (c.passing + c.alone * (layouts.pp == 1))
    yield (
        "turn",
        {
            **always,
            "gathered": gathered,
            "activations": turn.blocks * kept + turn.units * hidden + turn.heads * whole + received + sending * hidden,
            "working": words * (12.0 + 4.0 * (layouts.microbatches > 1)) * c.logits + besides,
        },
    )

    wide, f, d = (np.where(shape.gated, 2, 1) * ceil(shape.mlp, t)), ceil(shape.mlp, t), shape.width
    scattered = np.where(layouts.split_sequence == 1, whole, 0.0)  # the gradient of a sum that was scattered
    going = w * (tokens * wide + d * f) + scattered + 2 * hidden
    yield (
        "deep",
        {
            **always,
            "gathered": gathered,
            "gradients": always["gradients"] + c.fresh * every,
            "activations": deep.blocks * kept + deep.units * hidden + (deep.heads - deep.top) * whole + received,
            "working": c.passing * whole + again * (split.blocks > 0) + going,
        },
    )

    # DeepSpeed's sums are flat already, and the fused update works in place
    yield "update", {**always, "working": np.where(layouts.offload == 0, c.update * own + c.exchange * every, 0.0)}
