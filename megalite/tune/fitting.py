"""Constants from measured runs: the model is physics, a table of runs says how far this stack on these machines stays behind it.

In: runs, a cluster, the runtime as known so far.  Out: a runtime with other constants, and the spread that is left. Least squares on
log(predicted / measured), so that a run of 10 s and one of 10 ms count alike; Huber's weights (1964), since clusters have bad days; a prior
around the constants known before, so that what a table says nothing of stays where it was. Levenberg (1944) with numeric derivatives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from megalite.tune.cluster import Cluster
from megalite.tune.layouts import Array
from megalite.tune.runtime import Constants, MemoryConstants, Runtime, names
from megalite.tune.score import Runs, predict_memory, predict_time

SHARES = ("tp_hidden", "zero_hidden", "hop_shown", "matmul", "attention")  # between 0 and 1
KNEE = 0.15  # log error up to which a run counts in full
FREEDOM = 0.8  # standard deviation, in logs, that a constant is given around what it was


def fit_time(runs: Runs, cluster: Cluster, runtime: Runtime, *, freedom: float = FREEDOM, only: tuple[str, ...] = ()) -> Runtime:
    """The runtime with time constants fitted to the runs that have a time, and the spread of what is left."""
    runs = runs.take(np.isfinite(runs.seconds) & ~runs.failed)
    free = [name for name in names(Constants) if name in only or not only]
    known = {name: getattr(runtime.constants, name) for name in free}
    start = np.array([_unbound(name, value) for name, value in known.items()])

    def of(place: Array) -> Runtime:
        values = {name: _bound(name, value) for name, value in zip(free, place.tolist(), strict=True)}
        return replace(runtime, constants=replace(runtime.constants, **values))

    def errors(place: Array) -> Array:
        return np.log(predict_time(runs, cluster, of(place)) / runs.seconds)

    place = minimise(errors, start, freedom=freedom)
    return replace(of(place), spread=_spread(errors(place)))


def fit_memory(runs: Runs, runtime: Runtime, *, freedom: float = FREEDOM) -> Runtime:
    """The runtime with memory constants fitted to the runs that have a memory."""
    runs = runs.take(np.isfinite(runs.memory) & ~runs.failed)
    free = [name for name in names(MemoryConstants) if getattr(runtime.memory, name) > 0]
    start = np.log([getattr(runtime.memory, name) for name in free])

    def of(place: Array) -> Runtime:
        return replace(runtime, memory=replace(runtime.memory, **dict(zip(free, np.exp(place).tolist(), strict=True))))

    def errors(place: Array) -> Array:
        return np.log(predict_memory(runs, of(place)) / runs.memory)

    place = minimise(errors, start, freedom=freedom)
    return replace(of(place), memory_spread=_spread(errors(place)))


def _spread(left: Array) -> float:
    """A standard deviation that bad days do not move: of the median distance from the median."""
    return float(1.4826 * np.median(np.abs(left - np.median(left))))


def fit(runs: Runs, cluster: Cluster, runtime: Runtime) -> Runtime:
    """All that the runs say something of."""
    if (np.isfinite(runs.seconds) & ~runs.failed).any():
        runtime = fit_time(runs, cluster, runtime)
    if (np.isfinite(runs.memory) & ~runs.failed).any():
        runtime = fit_memory(runs, runtime)
    return runtime


def hold_out(runs: Runs, cluster: Cluster, runtime: Runtime, *, folds: int = 5) -> tuple[Array, Array]:
    """Seconds and bytes of every run, predicted with constants fitted to the other folds alone: row n is in fold n % folds."""
    fold = np.arange(len(runs.seconds)) % folds
    seconds, held = np.zeros(len(fold)), np.zeros(len(fold))
    for number in range(folds):
        known = fit(runs.take(fold != number), cluster, runtime)
        rest = runs.take(fold == number)
        seconds[fold == number] = predict_time(rest, cluster, known)
        held[fold == number] = predict_memory(rest, known)
    return seconds, held


def as_entry(runtime: Runtime, *, kinds: list[str], fitted: str) -> dict[str, Any]:
    """What constants.yaml holds of a fit."""
    rounded = {name: float(f"{getattr(runtime.constants, name):.4g}") for name in names(Constants)}
    weighed = {name: float(f"{getattr(runtime.memory, name):.4g}") for name in names(MemoryConstants)}
    spreads = {"spread": round(runtime.spread, 3), "memory_spread": round(runtime.memory_spread, 3)}
    return {"runtimes": [runtime.name], "kinds": kinds, "fitted": fitted, **spreads, "time": rounded, "memory": weighed}


def minimise(errors: Callable[[Array], Array], start: Array, *, freedom: float, rounds: int = 40) -> Array:
    """The place whose weighted squared errors, and squared distance from `start` in units of `freedom`, are least."""
    place, damping = start.copy(), 1e-2

    def cost(error: Array, where: Array) -> float:
        huber = np.where(np.abs(error) < KNEE, error**2, 2 * KNEE * np.abs(error) - KNEE**2).sum()
        return float(huber / KNEE**2 + (((where - start) / freedom) ** 2).sum())

    error = errors(place)
    now = cost(error, place)
    for _ in range(rounds):
        weight = np.minimum(1.0, KNEE / np.maximum(np.abs(error), 1e-12)) / KNEE**2
        slopes = np.stack([(errors(place + 1e-3 * row) - error) / 1e-3 for row in np.eye(len(place))], axis=1)
        normal = slopes.T @ (weight[:, None] * slopes) + np.eye(len(place)) / freedom**2
        pull = slopes.T @ (weight * error) + (place - start) / freedom**2
        for _ in range(8):
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -pull)
            there = place + np.clip(step, -1.0, 1.0)
            error_there = errors(there)
            if (cost_there := cost(error_there, there)) < now:
                break
            damping *= 4
        else:
            return place
        gained, place, error, now, damping = now - cost_there, there, error_there, cost_there, damping / 3
        if gained < 1e-5 * now:
            return place
    return place


def _unbound(name: str, value: float) -> float:
    if name in SHARES:
        share = min(max(value, 0.01), 0.99)
        return float(np.log(share / (1 - share)))
    return float(np.log(max(value, 1e-6)))


def _bound(name: str, value: float) -> float:
    return float(1 / (1 + np.exp(-value)) if name in SHARES else np.exp(value))
