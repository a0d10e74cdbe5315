"""How long a step takes, part by part: an arithmetic model of one optimizer step on every layout at once.

In: a shape, layouts with their stage splits, a cluster, a runtime's constants.  Out: seconds by part, `(n,)` each, whose sum is the step.

A matrix product m x n x k takes 2mnk over the reachable peak plus its operands and results over the memory's bandwidth, (mk + kn + mn) w:
the roofline of Williams et al. 2009, with a sum for its maximum, which rounds the corner as tiles and waves do. Attention by
FlashAttention is 4 s^2 h k over a peak of its own, causal ones half of that, backward 2.5 times as much (arXiv:2307.08691, section 3.1).
Norms, activations and residuals are bytes over bandwidth. A block cannot be faster than its kernels are launched. Collectives are alpha +
bytes / beta (Hockney 1994; rings as in Patarasuk and Yuan 2009); beta falls with the nodes that take part. A pipeline's step is the sum of
all stages once and the slowest m - 1 times more (Narayanan et al. 2021, arXiv:2104.04473, section 2.2, for stages that differ), unless
gradients of weights fill what is idle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megalite.tune.cluster import Cluster
from megalite.tune.layouts import ZERO_BUBBLE, Array, Layouts
from megalite.tune.runtime import Constants, Runtime
from megalite.tune.shape import Shape, ceil
from megalite.tune.splits import Split

PARTS = ("matmul", "attention", "elementwise", "launch", "tp", "cp", "bubble", "p2p", "zero", "optimizer", "host", "fixed")


@dataclass(frozen=True)
class Pass:
    """What one microbatch costs a rank, by part: of a block, and of the head. Seconds, forward and backward."""

    block: dict[str, Array]
    head: dict[str, Array]
    again: Array  # passes that a block's products take, of which one makes gradients of weights


def step_time(shape: Shape, layouts: Layouts, split: Split, *, cluster: Cluster, runtime: Runtime) -> dict[str, Array]:
    """Seconds of an optimizer step by the names of PARTS."""
    once = one_pass(shape, layouts, cluster, runtime)
    blocks: Array = sum(once.block.values())  # type: ignore[assignment]
    head: Array = sum(once.head.values())  # type: ignore[assignment]
    constants = runtime.constants
    embed = constants.embed * blocks  # a look-up and, under tensor parallelism, a sum
    m = layouts.microbatches
    ranks = split.blocks * blocks + split.head * head + split.embed * embed
    slowest = ranks.argmax(axis=0)
    rows = np.arange(len(layouts))
    worst = ranks[slowest, rows]
    whole = shape.layers * blocks + head + embed
    found: dict[str, Array] = dict.fromkeys(PARTS, np.zeros(len(layouts)))  # type: ignore[assignment]
    mine, last = split.blocks[slowest, rows], split.head[slowest, rows]
    for name in once.block:
        found[name] = m * (mine * once.block[name] + last * once.head.get(name, 0.0))
    found["elementwise"] = found["elementwise"] + m * split.embed[slowest, rows] * embed
    # gradients of weights, twice in (p - 1) (F + B + W) and in (p - 1) (F + B - W) (Qi et al. 2023, arXiv:2401.10241, table 2)
    filled = np.where(layouts.schedule == ZERO_BUBBLE, 2.0 * (shape.layers - mine) * once.block["matmul"] / once.again, 0.0)
    found["bubble"] = (whole - worst - filled) / layouts.chunks
    found["p2p"] = _between_stages(shape, layouts, cluster, runtime)
    weights = _weights(shape, layouts, split)
    gathered = _gathered(shape, layouts, weights, runtime)
    found["zero"] = _reductions(layouts, weights, gathered, backward=worst * 2 / 3, cluster=cluster, runtime=runtime)
    found["optimizer"], found["host"] = _update(layouts, weights, cluster, constants)
    found["fixed"] = np.full(len(layouts), constants.step) + constants.microbatch * m
    return found


def one_pass(shape: Shape, layouts: Layouts, cluster: Cluster, runtime: Runtime) -> Pass:
    c, gpu, t = runtime.constants, cluster.gpu, layouts.tp
    width = runtime.width
    peak, bandwidth = cluster.peak(runtime.precision), gpu.bandwidth
    tokens = layouts.micro * shape.sequence / layouts.cp
    d, f, k = shape.width, ceil(shape.mlp, t), shape.head_width
    again = 3.0 + (layouts.recompute == 2)  # passes over a product: forward, backward twice, and forward again

    def product(n: Array, inner: Array, passes: Array | float) -> Array:
        moved = (tokens * n + tokens * inner + n * inner) * width / bandwidth
        return passes * (2.0 * tokens * n * inner / (peak * c.matmul) + moved * c.operands)

    block = product(shape.columns(t), d, again) + product(d, ceil(shape.heads, t) * k, again)
    block = block + product(shape.ups * f, d, again) + product(d, f, again)
    own = ceil(shape.heads, t * layouts.cp) * layouts.micro * shape.sequence * shape.sequence
    passes = 3.5 + (layouts.recompute == 2)
    halved = np.where(shape.bert, 1.0, 0.5)
    if runtime.flash:
        attention = passes * 4.0 * own * k * halved / (peak * c.attention)
    else:  # scores are written and read: products, scale, mask, softmax, dropout and back
        attention = (again * 4.0 * own * k / (peak * c.matmul)) + (again * 8.0 * own * width / bandwidth) * c.scores
    share = np.where(layouts.split_sequence == 1, t, 1)
    sums = 26.0 + 4.0 * shape.dropout  # two gradients are read and written; forward it is added up with what is added anyway
    elements = tokens * (sums * d / share + (8.0 * shape.ups - 3.0) * f + 6.0 * shape.columns(t) * np.where(shape.rope, 1, 0))
    elementwise = elements * (1 + 0.35 * (layouts.recompute > 0)) * width / bandwidth * c.elementwise
    tp = _tensor_parallel(shape, layouts, tokens, cluster, runtime)
    cp = _context_parallel(shape, layouts, tokens, cluster, runtime)
    busy = block + attention + elementwise + tp + cp
    far = (layouts.pp > 1) & (layouts.world > cluster.gpus)  # sends to other nodes stand in the way of collectives
    floor = (c.launch + c.launch_tp * t / 8 + c.launch_far * t * far) * (1 + (layouts.recompute == 2) / 3)
    launch = (busy**12 + floor**12) ** (1 / 12) - busy  # whichever is longer, the corner rounded
    head = product(ceil(shape.vocab, t), d, 3.0 if shape.pieces == 1 else 4.0)
    logits = tokens * ceil(shape.vocab, t) * 4.0 * 8.0 / bandwidth * c.logits
    if shape.pieces > 1:  # each adds to the input's gradient in fp32
        logits = logits + shape.pieces * tokens * d * (8.0 + width) / bandwidth * c.elementwise
    return Pass(
        {"matmul": block, "attention": attention, "elementwise": elementwise, "launch": launch, "tp": tp, "cp": cp},
        {"matmul": head, "elementwise": logits, "launch": floor * c.embed, "tp": tp / 4},
        again,
    )


def _tensor_parallel(shape: Shape, layouts: Layouts, tokens: Array, cluster: Cluster, runtime: Runtime) -> Array:
    """Four sums of a hidden state a block and microbatch, or as many gathers and scatters; six where the forward pass runs again."""
    c, t = runtime.constants, layouts.tp
    size = tokens * shape.width * runtime.width
    sums = 4.0 + 2.0 * (layouts.recompute == 2)
    nodes = np.maximum(1, t / cluster.gpus)
    inside = np.minimum(t, cluster.gpus)
    within = 2.0 * (inside - 1) / inside * size / (cluster.inside * c.tp_inside)
    across = np.where(nodes > 1, 2.0 * (nodes - 1) / nodes * size / inside * inside / (cluster.between(nodes) * c.tp_between), 0.0)
    latency = np.where(nodes > 1, c.alpha_between * nodes, np.where(t > 1, c.alpha_inside, 0.0))
    return sums * (within + across + latency) * (1 - c.tp_hidden)


def _context_parallel(shape: Shape, layouts: Layouts, tokens: Array, cluster: Cluster, runtime: Runtime) -> Array:
    """Ulysses: queries, keys, values and what is mixed of them, to the other ranks and back, in both passes."""
    c, cp = runtime.constants, layouts.cp
    size = tokens * (2 * ceil(shape.heads, layouts.tp) + 2 * np.maximum(ceil(shape.kv_heads, layouts.tp), cp)) * shape.head_width
    size = size * runtime.width * (cp - 1) / cp * (2 + (layouts.recompute == 2))
    nodes = np.maximum(1, cp * layouts.tp / cluster.gpus)
    speed = np.where(nodes > 1, cluster.between(nodes) / cluster.gpus * c.tp_between, cluster.inside * c.tp_inside)
    return np.where(cp > 1, size / speed + 4 * c.alpha_inside, 0.0)


def _between_stages(shape: Shape, layouts: Layouts, cluster: Cluster, runtime: Runtime) -> Array:
    """A hidden state and its gradient at every seam: all of them while the pipeline fills, a part of them after that."""
    c = runtime.constants
    share = np.where(layouts.split_sequence == 1, layouts.tp, 1) * layouts.cp
    size = layouts.micro * shape.sequence * shape.width * runtime.width / share
    stride = layouts.tp * layouts.cp * np.where(runtime.outer == "pp", layouts.dp, 1)
    across = stride >= cluster.gpus
    speed = np.where(across, cluster.node_link / cluster.gpus, cluster.inside / 2)
    hop = c.alpha_hop + size / speed
    hops = layouts.chunks * (2.0 * (layouts.pp - 1) + 2.0 * c.hop_shown * layouts.microbatches)
    return np.where(layouts.pp > 1, hops * hop, 0.0)


def _weights(shape: Shape, layouts: Layouts, split: Split) -> Array:
    """Parameters of the fullest rank."""
    t = layouts.tp
    of = split.blocks * (shape.block_cut(t) + shape.block_whole)
    ends = split.embed * (shape.embed_cut(t) + shape.embed_whole) + split.head * (shape.head_cut(t) + shape.head_whole)
    return (of + ends).max(axis=0)


def _gathered(shape: Shape, layouts: Layouts, weights: Array, runtime: Runtime) -> Array:
    """Elements that ZeRO-3 gathers in a step: what may stay once (parallel/gather.py, `choose`), the rest for each use."""
    room = layouts.live - layouts.bucket - shape.vocab_weight(layouts.tp) if runtime.name == "megalite" else 0.0
    lasting = np.where(layouts.live >= weights, weights, np.clip(room, 0.0, weights))
    return lasting + (weights - lasting) * (2.0 + (layouts.recompute > 0)) * layouts.microbatches


def _reductions(layouts: Layouts, weights: Array, gathered: Array, *, backward: Array, cluster: Cluster, runtime: Runtime) -> Array:
    """Gradients over the ranks that hold the same weights, updated weights back, and what ZeRO-3 gathers."""
    c, n = runtime.constants, layouts.copies
    inner = layouts.tp * np.where(runtime.outer == "dp", layouts.pp, 1)  # ranks between neighbours
    inside = np.clip(cluster.gpus / inner, 1, n)  # of a group on one node
    nodes = n / inside
    rings = np.minimum(cluster.gpus, inner * 1.0)  # groups that share a node's links
    beta = np.where(nodes > 1, cluster.between(nodes) * c.zero_between / rings, cluster.inside * c.zero_inside)
    move = (n - 1) / n * weights / beta  # seconds a byte width of 1, one way
    many = layouts.microbatches
    stage = np.where(layouts.once & (layouts.stage == 2), 1, layouts.stage)
    rounds = np.where(layouts.once, 1, many)
    ways = np.where(np.isin(stage, runtime.scatters), 1, 2)
    reduce = move * ways * np.where(layouts.once, runtime.summed_width, runtime.gradient_width) * rounds
    gather = np.where((layouts.stage > 0) & (layouts.stage < 3), move * runtime.width, 0.0)
    gathers = np.where(layouts.stage == 3, gathered / weights * move * runtime.width, 0.0)
    hidden = np.minimum(reduce * c.zero_hidden, backward * rounds)
    covered = np.minimum(gathers * c.zero_hidden, backward * many)
    latency = c.alpha_between * np.log2(np.maximum(nodes, 1)) * rounds
    return np.where(n > 1, reduce - hidden + gather + gathers - covered + latency, 0.0)


def _update(layouts: Layouts, weights: Array, cluster: Cluster, c: Constants) -> tuple[Array, Array]:
    """AdamW reads and writes about 30 bytes a parameter: on the GPU, or on the host, with the gradients down and the weights up."""
    own = weights / layouts.shards
    on_gpu = own * 30.0 / cluster.gpu.bandwidth * c.optimizer
    on_host = own * (30.0 / (cluster.host_bandwidth / cluster.gpus) + (4.0 + 2.0) / cluster.host_link) * c.host
    lifted = np.where(layouts.offload == 2, layouts.microbatches * 2 * 2.0 * own / cluster.host_link, 0.0)
    offloaded = layouts.offload > 0
    return np.where(offloaded, 0.0, on_gpu), np.where(offloaded, on_host + lifted, 0.0)


def total(parts: dict[str, Array], layouts: Layouts, cluster: Cluster, runtime: Runtime) -> Array:
    """Seconds of the step. The more nodes wait for each other, the more the slowest of them decides."""
    nodes = np.maximum(1.0, layouts.world / cluster.gpus)
    return sum(parts.values()) * (1 + runtime.constants.straggle * np.log2(nodes))  # type: ignore[return-value]
