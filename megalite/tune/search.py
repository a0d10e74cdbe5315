"""The layouts of a run on a cluster, the fastest that fits first; and why its neighbours are not in its place.

In: a run config, a cluster, a runtime, settings that are pinned.  Out: `Found`. Memory is computed for every legal layout, time for those
that fit; a million layouts take seconds on one core.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megalite.config import Config
from megalite.errors import UserError
from megalite.hardware import GIB
from megalite.tune import choices, memory, speed
from megalite.tune.cluster import Cluster
from megalite.tune.kept import parameters
from megalite.tune.layouts import Array, Layouts, enumerate_layouts, legal
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.splits import split

BLOCK = 1 << 14  # rows at a time, so that what is computed with stays in the processor's cache
SURE = 2.0  # standard deviations of the memory's error that must fit too: 2 % of them do not
INTERVAL = 1.2816  # standard deviations on both sides of 80 %


@dataclass(frozen=True)
class Judged:
    """Layouts with what is predicted of them."""

    layouts: Layouts
    held: Array  # bytes at the peak of the fullest rank
    moment: Array
    host: Array  # bytes a rank needs of its host
    seconds: Array  # of a step; infinite where it does not fit


@dataclass(frozen=True)
class Found:
    """All legal layouts, and the order of those that fit: the fastest first, of equals the smallest."""

    config: Config
    cluster: Cluster
    runtime: Runtime
    judged: Judged
    order: Array

    @property
    def limit(self) -> float:
        return limit(self.cluster, self.runtime)

    def best(self, num: int) -> list[int]:
        """Rows of the first `num`, without those that differ from an earlier one in buckets alone."""
        seen, found = set(), []
        for row in self.order.tolist():
            words = choices.say(self.judged.layouts.row(row))
            if words not in seen:
                seen.add(words)
                found.append(row)
                if len(found) == num:
                    break
        return found


def limit(cluster: Cluster, runtime: Runtime) -> float:
    """Bytes that a prediction may reach so that the truth fits too."""
    return cluster.usable / (1 + SURE * runtime.memory_spread)


def search(config: Config, cluster: Cluster, runtime: Runtime, *, pinned: dict[str, int] | None = None) -> Found:
    """Raises UserError where no layout is legal."""
    layouts = enumerate_layouts(config, cluster.world, pinned=pinned or {})
    if config.train.compile and len(layouts):
        layouts = layouts.take(_stays(config, layouts, runtime))
    if not len(layouts):
        what = f"train.global_batch = {config.train.global_batch} on {cluster.world} GPUs"
        given = [*(pinned or {}), *(["train.compile"] if config.train.compile else [])]
        fixed = f" with {', '.join(given)} as given" if given else ""
        raise UserError(f"{what}{fixed} has no layout; choose a global batch with more divisors, or give fewer settings")
    judged = judge(config, layouts, cluster, runtime)
    return Found(config, cluster, runtime, judged, ranked(judged))


def _stays(config: Config, layouts: Layouts, runtime: Runtime) -> Array:
    """Where the weights of a stage may stay for a step, as compiled blocks need under ZeRO-3 (engine.py)."""
    shape = Shape.of(config)
    weights = parameters(shape, layouts, split(shape, layouts, runtime.rule)).max(axis=0)
    return (layouts.stage < 3) | (weights <= layouts.live)


def ranked(judged: Judged) -> Array:
    """The rows that fit, the fastest first, of equals the smallest."""
    fits = np.flatnonzero(np.isfinite(judged.seconds))
    return fits[np.lexsort((judged.held[fits], judged.seconds[fits]))]


def judge(config: Config, layouts: Layouts, cluster: Cluster, runtime: Runtime) -> Judged:
    """Memory of all, time of those that fit."""
    shape = Shape.of(config)
    runtime = for_precision(runtime, config)
    alike = (layouts.schedule << 40) + (layouts.pp << 20) + layouts.chunks  # side by side, pipelines have less to be told apart
    order = np.argsort(alike, kind="stable")
    parts = [_judge(shape, layouts.take(order[rows]), cluster, runtime) for rows in _blocks(len(layouts))]
    back = np.argsort(order, kind="stable")
    return Judged(layouts, *(np.concatenate(column)[back] for column in zip(*parts, strict=True)))


def for_precision(runtime: Runtime, config: Config) -> Runtime:
    """Ours runs in the run's own type."""
    if runtime.name != "megalite":
        return runtime
    width = 4 if config.train.precision == "fp32" else 2
    return replace(runtime, precision=config.train.precision, width=width, gradient_width=width)


def _blocks(num: int) -> Iterator[slice]:
    for start in range(0, num, BLOCK):
        yield slice(start, start + BLOCK)


def _judge(shape: Shape, layouts: Layouts, cluster: Cluster, runtime: Runtime) -> tuple[Array, ...]:
    ranks = split(shape, layouts, runtime.rule)
    account = memory.waterfall(shape, layouts, ranks, runtime)
    held = memory.peak(account)
    host = memory.host(shape, layouts, ranks, runtime)
    fits = np.flatnonzero((held <= limit(cluster, runtime)) & (host * cluster.gpus <= cluster.host_memory))
    seconds = np.full(len(layouts), np.inf)
    if len(fits):
        few = layouts.take(fits)
        few_ranks = ranks.take(fits)
        times = speed.step_time(shape, few, few_ranks, cluster=cluster, runtime=runtime)
        seconds[fits] = speed.total(times, few, cluster, runtime)
    return held, account["moment"], host, seconds


def interval(value: float, spread: float) -> tuple[float, float]:
    """80 % of the truths lie between them, errors being normal in logs."""
    factor = float(np.exp(INTERVAL * spread))
    return value / factor, value * factor


def mfu(found: Found, seconds: float) -> float:
    """Model FLOPs (models/counts.py) over what the GPUs of the data sheet could do in that time."""
    flops = float(Shape.of(found.config).step_flops(found.config.train.global_batch))
    peak = found.cluster.gpu.peak(found.config.train.precision)
    assert peak is not None, "the cluster has refused that type"
    return flops / seconds / found.cluster.world / peak


@dataclass(frozen=True)
class Neighbour:
    """A layout that differs in one setting from the best, and why it is not the best."""

    words: str
    reason: str


def neighbours(found: Found, row: int) -> list[Neighbour]:
    """One setting changed at a time."""
    best = found.judged.layouts.row(row)
    told = []
    for other in _changes(best):
        words = choices.say(other)
        if reason := choices.why_not(found.config, other):
            told.append(Neighbour(words, f"no: {reason}"))
            continue
        one = Layouts.of(**other)
        if not legal(found.config, one)[0]:
            continue
        judged = judge(found.config, one, found.cluster, found.runtime)
        told.append(Neighbour(words, _reason(found, judged, found.judged.seconds[row])))
    return told


def _reason(found: Found, judged: Judged, best: float) -> str:
    held, room = judged.held[0] / GIB, found.cluster.usable / GIB
    if judged.held[0] > found.limit:
        sure = "" if held > room else f", too near for a prediction with an error of {found.runtime.memory_spread:.0%}"
        return f"no: {held:.1f} of {room:.1f} GiB at {WHEN[int(judged.moment[0])]}{sure}"
    if not np.isfinite(judged.seconds[0]):
        need, there = judged.host[0] * found.cluster.gpus / GIB, found.cluster.host_memory / GIB
        return f"no: {need:.0f} of {there:.0f} GiB of host memory"
    return f"{judged.seconds[0] / best - 1:+.1%} time, {held:.1f} GiB"


WHEN = (
    "start-up",
    "the turn from forward to backward",
    "the first backward block",
    "the reduction of a bucket",
    "the end of the backward pass",
    "the update",
)


def _changes(best: dict[str, int]) -> Iterator[dict[str, int]]:
    def change(**values: int) -> dict[str, int]:
        return {**best, **values}

    if best["micro"] > 1:
        yield change(micro=best["micro"] // 2)
    yield change(micro=best["micro"] * 2)
    for stage in (best["stage"] - 1, best["stage"] + 1):
        if 0 <= stage <= 3 and (stage > 0 or not best["offload"]):
            yield change(stage=stage)
    for recompute in range(3):
        if recompute != best["recompute"]:
            yield change(recompute=recompute)
    for axis, other in (("tp", "dp"), ("pp", "dp"), ("tp", "pp"), ("dp", "tp"), ("dp", "pp"), ("pp", "tp")):
        if best[axis] % 2 == 0:
            moved = change(**{axis: best[axis] // 2, other: best[other] * 2})
            yield {
                **moved,
                **({"schedule": 0, "chunks": 1} if moved["pp"] == 1 else {}),
                **({"split_sequence": 0} if moved["tp"] == 1 else {}),
            }
    if best["tp"] > 1:
        yield change(split_sequence=1 - best["split_sequence"])
    if not best["offload"] and best["stage"]:
        yield change(offload=1)
