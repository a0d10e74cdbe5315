"""What autograd keeps of a block until its gradients are asked for, and how many parameters a rank holds.

In: a shape, layouts, a runtime.  Out: bytes and numbers. Counted as Korthikanti et al. 2022, arXiv:2205.05198, section 4, for fused
attention and this house's blocks (models/layers.py).
"""

from __future__ import annotations

import numpy as np

from megalite.tune.layouts import RECOMPUTE, Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape, ceil
from megalite.tune.splits import Split

FULL, SELECTIVE = RECOMPUTE.index("full"), RECOMPUTE.index("selective")


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
    draws = np.where(shape.attention_dropout, 8.0, 0.0) * ceil(shape.heads, t)  # a number a row and a key of each head
    whole = tokens * (w * (c.linear * narrow + c.widening * activation) + rows + draws) + turned
    if not runtime.flash:
        heads = ceil(shape.heads, t) * layouts.micro * 1.0 * shape.sequence**2
        whole = whole + heads * (2 * w + 1)  # scores before and after dropout, and its mask
    attention = mixed + 4.0 / w * ceil(shape.heads, t)  # what it puts out, and a number in fp32 for every row
    # attention's projection, and, where a norm follows that saves it, the MLP's; behind exchanges what came, and not what was sent
    results = (1.0 + np.asarray(shape.bert)) * d / share
    dear = tokens * w * (d / share + columns + attention + results + shape.ups * f + exchanged)
    entry = tokens * w * d / share
    kept = np.select([layouts.recompute == FULL, layouts.recompute == SELECTIVE], [entry + 0 * whole, dear], whole)
    # norms, their sum, GELU; the results are added to what was there and let go
    passed = (1.0 + np.asarray(shape.bert)) * d / share if runtime.name == "megalite" else 0.0
    cheap = tokens * (w * (3.0 * d / share + rotated + activation - shape.ups * f - passed) + 4 * 4.0 / share + draws) + turned
    again = np.select([layouts.recompute == FULL, layouts.recompute == SELECTIVE], [whole - kept, cheap], 0.0)
    return kept, again


def parameters(shape: Shape, layouts: Layouts, split: Split) -> Array:
    """Of every kind of rank, after tensor parallelism, (kinds, n)."""
    t = layouts.tp
    block = np.asarray(shape.block_cut(t) + shape.block_whole, dtype=float)
    ends = split.embed * (shape.embed_cut(t) + shape.embed_whole) + split.head * (shape.head_cut(t) + shape.head_whole)
    shared = split.embed * split.head * np.where(shape.tied, shape.vocab_weight(t), 0)
    return split.blocks * block + ends - shared
