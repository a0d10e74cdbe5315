"""How well do the predictions stand beside measured runs? `megalite tune --score FILE.csv --runtime R`.

In: a table, one run a row.  Out: the errors, in the terms in which a user would curse: layouts that were said to fit and did not, memory,
step time, and whether the best one would have been found.

Columns: layers hidden heads seq mbs gbs, and tp pp dp (dp may be left out where gpus is there); at least one measured: iter_ms, tok_s_gpu
or tflops_gpu for time, mem_gib for memory, status (ok, oom, fail). Optional: kv_heads (heads), ffn (4 x hidden), vocab (51200), tied_embed
(1), gated (1 where ffn is given and is not 4 x hidden), cp (1), zero (0), recompute (none; full for megatron-deepspeed), chunks (1),
nodes, model and suspect (1: left out). A cell is what a user would choose within: rows of the same model, GPUs, sequence and batch.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.errors import UserError
from megalite.tune import memory, speed
from megalite.tune.cluster import Cluster
from megalite.tune.layouts import RECOMPUTE, Array, Layouts
from megalite.tune.runtime import Runtime
from megalite.tune.shape import Shape
from megalite.tune.splits import split

NEEDED = ("layers", "hidden", "heads", "seq", "mbs", "gbs")


@dataclass(frozen=True)
class Runs:
    """A table of runs as arrays; what was not measured is NaN."""

    shape: Shape
    layouts: Layouts
    seconds: Array
    memory: Array  # bytes
    failed: Array  # ended without a figure: out of memory, most of them
    cell: Array  # numbers

    def take(self, rows: Array) -> Runs:
        columns = (getattr(self, name)[rows] for name in ("seconds", "memory", "failed", "cell"))
        return Runs(self.shape.take(rows), self.layouts.take(rows), *columns)


def read_runs(path: Path, runtime: Runtime) -> Runs:
    """A table in the calibration format. Raises UserError for a missing column or a value that is no number."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row.get("suspect", "0") in ("", "0", None)]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--score {path} cannot be read ({error}); name a CSV file") from None
    if not rows:
        raise UserError(f"--score {path} holds no runs; it needs a line of column names and one line a run")
    missing = [name for name in NEEDED if name not in rows[0]]
    if missing or not ({"dp", "gpus"} & rows[0].keys()):
        raise UserError(f"--score {path} has no column {(missing or ['dp or gpus'])[0]}; it has {', '.join(map(str, rows[0]))}")

    def column(name: str, default: float | Array) -> Array:
        fallback = np.broadcast_to(default, len(rows))
        return np.array([_number(row.get(name), other, path, name) for row, other in zip(rows, fallback, strict=True)])

    def whole(name: str, default: float | Array) -> Array:
        return column(name, default).astype(np.int64)

    layers, hidden, heads = whole("layers", 0), whole("hidden", 0), whole("heads", 0)
    ffn = whole("ffn", 4 * hidden)
    gated = whole("gated", (ffn != 4 * hidden) | ("ffn" in rows[0])).astype(bool)
    vocab, sequence = whole("vocab", 51200), whole("seq", 0)
    shape = Shape(
        layers=layers, width=hidden, heads=heads, kv_heads=whole("kv_heads", heads), mlp=ffn, vocab=vocab, sequence=sequence,
        gated=gated, tied=whole("tied_embed", 1).astype(bool), bias=~gated, learned=~gated, rms=gated,
        positions=np.where(gated, 0, sequence), rope=gated,
    )  # fmt: skip
    tp, pp, cp = whole("tp", 1), whole("pp", 1), whole("cp", 1)
    dp = whole("dp", np.maximum(1, column("gpus", 0) // (tp * pp * cp)))
    again = "full" if runtime.name == "megatron-deepspeed" else "none"
    layouts = Layouts.of(
        dp=dp, tp=tp, pp=pp, cp=cp, chunks=whole("chunks", 1), micro=whole("mbs", 1), batch=whole("gbs", 1), stage=whole("zero", 0),
        recompute=np.array([RECOMPUTE.index(row.get("recompute") or again) for row in rows]),
        split_sequence=(tp > 1) & (runtime.name == "nanotron"),
    )  # fmt: skip
    seconds = column("iter_ms", np.nan) / 1e3
    world = layouts.world
    tokens = layouts.batch * sequence
    seconds = np.where(np.isnan(seconds), tokens / (column("tok_s_gpu", np.nan) * world), seconds)
    flops = 96.0 * tokens * layers * hidden**2 * (1 + sequence / (6.0 * hidden) + vocab / (16.0 * layers * hidden))  # with recomputation
    seconds = np.where(np.isnan(seconds), flops / (column("tflops_gpu", np.nan) * 1e12 * world), seconds)
    failed = np.array([(row.get("status") or "ok") != "ok" for row in rows])
    cells = np.stack([layers, hidden, sequence, layouts.batch, world], axis=1)
    return Runs(
        shape, layouts, seconds, column("mem_gib", np.nan) * 2**30, failed, np.unique(cells, axis=0, return_inverse=True)[1].ravel()
    )


def _number(text: str | None, default: float, path: Path, name: str) -> float:
    if text is None or text == "":
        return float(default)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--score {path}: {name} = {text!r} is no number") from None


def predict_time(runs: Runs, cluster: Cluster, runtime: Runtime) -> Array:
    """Seconds of a step, row by row; a run takes as many nodes of the cluster as it needs."""
    parts = split(runs.shape, runs.layouts, runtime.rule)
    of = speed.step_time(runs.shape, runs.layouts, parts, cluster=cluster, runtime=runtime)
    return speed.total(of, runs.layouts, cluster, runtime)


def predict_memory(runs: Runs, runtime: Runtime) -> Array:
    """Bytes at the peak of the fullest rank, row by row."""
    parts = split(runs.shape, runs.layouts, runtime.rule)
    return memory.peak(memory.waterfall(runs.shape, runs.layouts, parts, runtime))


@dataclass(frozen=True)
class Score:
    """Errors of predictions; NaN where the table says nothing of it."""

    timed: int  # runs with a time
    weighed: int  # runs with a memory
    time_mean: float  # mean |predicted / measured - 1|
    time_median: float
    memory_median: float
    false_fits: float  # of the runs that ran out of memory (or failed), those said to fit with room to spare, of all runs said to fit
    false_memory: float  # the same without those that failed for another reason: a run that needs no less memory ran
    false_misses: float  # of the runs that ran, those said not to fit
    rank: float  # Spearman's rank correlation within a cell, mean over the cells
    top_five: float  # share of the cells whose best layout is among our best five
    regret: float  # time of our first choice over the best one, less 1: mean over the cells


def score(runs: Runs, seconds: Array, held: Array, *, limit: float) -> Score:
    """`seconds` and `held` are predicted; `limit`: bytes of the GPU."""
    timed = np.isfinite(runs.seconds) & ~runs.failed
    weighed = np.isfinite(runs.memory) & ~runs.failed
    off = np.abs(seconds[timed] / runs.seconds[timed] - 1)
    heavy = np.abs(held[weighed] / runs.memory[weighed] - 1)
    fits = held <= limit
    ranks, hits, regrets = [], [], []
    for cell in np.unique(runs.cell[timed]):
        here = timed & (runs.cell == cell)
        if here.sum() < 5:
            continue
        ours, truth = seconds[here], runs.seconds[here]
        ranks.append(np.corrcoef(_ranks(ours), _ranks(truth))[0, 1])
        hits.append(truth.argmin() in ours.argsort()[:5])
        regrets.append(truth[ours.argmin()] / truth.min() - 1)
    return Score(
        timed=int(timed.sum()),
        weighed=int(weighed.sum()),
        time_mean=_mean(off),
        time_median=float(np.median(off)) if len(off) else np.nan,
        memory_median=float(np.median(heavy)) if len(heavy) else np.nan,
        false_fits=_mean((fits & runs.failed)[fits]) if runs.failed.any() else np.nan,
        false_memory=_mean((fits & runs.failed & ~_as_much_ran(runs))[fits]) if runs.failed.any() else np.nan,
        false_misses=_mean(~fits[~runs.failed]),
        rank=_mean(ranks),
        top_five=_mean(hits),
        regret=_mean(regrets),
    )


def _as_much_ran(runs: Runs) -> Array:
    """Of each run, whether one ran that needs no less memory by any account: a model as large, cut into as many stages and by no more
    ranks, with as many tokens in a microbatch, as many of those in flight, and no more ZeRO or recomputation.
    """
    layouts = runs.layouts
    flight = np.minimum(layouts.microbatches, layouts.pp)
    larger = [*np.broadcast_arrays(runs.shape.layers, runs.shape.width, runs.shape.sequence, layouts.micro)[:4], flight]
    smaller = [layouts.tp, layouts.cp, layouts.dp, layouts.stage, layouts.recompute, layouts.split_sequence]
    ran = ~runs.failed
    found = np.ones((len(ran), len(ran)), dtype=bool)  # [run, other]
    for column in larger:
        found &= column[None, :] >= column[:, None]
    for column in smaller:
        found &= column[None, :] <= column[:, None]
    found &= (layouts.pp[None, :] == layouts.pp[:, None]) & ran
    return found.any(axis=1)


def _ranks(values: Array) -> Array:
    return values.argsort().argsort()


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
