"""How much memory a rank needs at its fullest, as a waterfall: what lies there for the whole run, and what comes and goes.

In: a shape, layouts with their stage splits, a runtime.  Out: bytes by part, of the fullest rank of each layout, and what the host holds.
A step has a few moments that can be its fullest, and building the engine one:

    turn       all activations are there and the head goes back: logits, and over them their gradient
    deep       the first blocks that go back, with their gradients and the first bucket
    reduction  a bucket of gradients is on its way to the other ranks while the next one is filled
    end        the embedding goes back, the last of all
    update     activations are gone, the optimizer needs room for its arithmetic

What is there at each of them is an account of the engine: ours in account.py, and for zero-bubble schedules in halves.py, those of other
runtimes in others.py. ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalite.tune import account, halves, others
from megalite.tune.kept import parameters
from megalite.tune.layouts import ZERO_BUBBLE, Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.splits import Split

PARTS = ("weights", "gathered", "optimizer", "gradients", "buckets", "activations", "working", "batch", "runtime")
MOMENTS = ("start-up", "turn", "deep", "reduction", "end", "update")


def waterfall(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> dict[str, Array]:
    """Bytes by the names of PARTS at the fullest moment of the fullest rank; their sum is the peak. `moment` indexes MOMENTS, `rank` the
    split."""
    halved = layouts.schedule == ZERO_BUBBLE
    if runtime.name == "megalite" and halved.any():
        return _both(shape, layouts, split, runtime, halved)
    return _fullest(account if runtime.name == "megalite" else others, shape, layouts, split, runtime)


def _both(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime, halved: Array) -> dict[str, Array]:
    """Where backward passes are halved, and where they are whole."""
    found: dict[str, Array] = {}
    for engine, rows in ((halves, halved), (account, ~halved)):
        if rows.any():
            for name, values in _fullest(engine, shape.take(rows), layouts.take(rows), split.take(rows), runtime).items():
                found.setdefault(name, np.zeros(len(layouts), dtype=values.dtype))[rows] = values
    return found


def _fullest(engine: Any, shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> dict[str, Array]:
    names, moments, sums = zip(*engine.moments(shape, layouts, split, runtime), strict=True)
    totals = np.stack(sums)  # (moments, kinds, n)
    rank = totals.max(axis=0).argmax(axis=0)
    moment = totals[:, rank, np.arange(len(layouts))].argmax(axis=0)
    found = {name: np.zeros(len(layouts)) for name in PARTS}
    for number, parts in enumerate(moments):
        rows = np.flatnonzero(moment == number)
        for name, size in parts.items():
            found[name][rows] = np.broadcast_to(size, totals.shape[1:])[rank[rows], rows]
    return {**found, "moment": np.array([MOMENTS.index(name) for name in names])[moment], "rank": rank}


def peak(parts: dict[str, Array]) -> Array:
    return sum(parts[name] for name in PARTS)  # type: ignore[return-value]


def host(shape: Shape, layouts: Layouts, split: Split, runtime: Runtime) -> Array:
    """Bytes of host memory a rank needs: what is offloaded, and while building one layer of the model in fp32."""
    own = parameters(shape, layouts, split).max(axis=0) / layouts.shards
    offloaded = np.where(layouts.offload >= 1, 16.0 * own, 0.0) + np.where(layouts.offload == 2, runtime.width * own, 0.0)
    layer = 4.0 * np.maximum(shape.block_cut(1) + shape.block_whole, shape.vocab_weight())
    return offloaded + 2 * layer
