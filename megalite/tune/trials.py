"""What short measured runs teach: which layout to try next, and which is best, when predictions are a guide and measurements the judge.

In: layouts with what is predicted of them, and of each that was tried what became of it.  Out: the next one to try. After every trial the
constants are fitted anew to all that was measured, around those known before, and the rest is ranked again. A layout that ran out of
memory takes with it all that are predicted to need as much; one that hangs or crashes goes alone. A node that fails is no fault of the
layout, which may be tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from megalite.tune import fitting
from megalite.tune.cluster import Cluster
from megalite.tune.layouts import Array
from megalite.tune.runtime import Runtime
from megalite.tune.score import Runs, predict_memory, predict_time

PATIENCE = 2  # nodes that may fail under one layout, and failures a trial that succeeds may cost


@dataclass(frozen=True)
class Outcome:
    """Of one trial. status: ok, oom, timeout, crash, refused, or lost (a node failed); seconds of a step and bytes at the peak if ok."""

    status: str
    seconds: float = float("nan")
    memory: float = float("nan")
    reason: str = ""


@dataclass
class Hunt:
    """`runs`: the layouts to choose from, nothing of them measured. `runtime`: the constants as they are before the first trial."""

    runs: Runs
    cluster: Cluster
    runtime: Runtime
    tried: dict[int, Outcome] = field(default_factory=dict)  # by row, the last outcome of each
    lost: dict[int, int] = field(default_factory=dict)  # nodes that failed under a row
    known: Runtime = field(init=False)  # the constants as the trials have them
    seconds: Array = field(init=False)  # predicted by these, as `memory` is
    memory: Array = field(init=False)
    room: float = field(init=False, default=float("inf"))  # predicted bytes at which a layout ran out of memory

    def __post_init__(self) -> None:
        self._predict(self.runtime)

    def _predict(self, known: Runtime) -> None:
        self.known = known
        self.seconds = predict_time(self.runs, self.cluster, known)
        self.memory = predict_memory(self.runs, known)
        self.room = min((float(self.memory[row]) for row, outcome in self.tried.items() if outcome.status == "oom"), default=float("inf"))

    def next(self) -> int | None:
        """The row that is predicted to be the fastest of those that may be tried; None if there is none left."""
        open_ = self.memory < self.room
        open_[[row for row, outcome in self.tried.items() if outcome.status != "lost" or self.lost[row] >= PATIENCE]] = False
        rows = np.flatnonzero(open_)
        return int(rows[self.seconds[rows].argmin()]) if len(rows) else None

    def hear(self, row: int, outcome: Outcome) -> None:
        """Learn from a trial of a row."""
        self.tried[row] = outcome
        self.lost[row] = self.lost.get(row, 0) + (outcome.status == "lost")
        seconds, memory = np.full(len(self.seconds), np.nan), np.full(len(self.seconds), np.nan)
        for known, told in self.tried.items():
            seconds[known], memory[known] = told.seconds, told.memory
        ran = [known for known, told in self.tried.items() if told.status == "ok"]
        if ran:
            measured = replace(self.runs, seconds=seconds, memory=memory).take(np.array(ran))
            learned = fitting.fit(measured, self.cluster, self.runtime)
            # a handful of trials says where the truth is, not how far it scatters
            self._predict(replace(learned, spread=self.runtime.spread, memory_spread=self.runtime.memory_spread))
        else:
            self._predict(self.runtime)

    def best(self) -> int | None:
        """The fastest row that was measured."""
        ran = {row: outcome.seconds for row, outcome in self.tried.items() if outcome.status == "ok"}
        return min(ran, key=lambda row: ran[row]) if ran else None

    def is_over(self, trials: int) -> bool:
        """Whether so many trials have run, or so many failed that more is no use."""
        ran = sum(outcome.status == "ok" for outcome in self.tried.values())
        failed = len(self.tried) - ran + sum(self.lost.values())
        return ran >= trials or failed >= PATIENCE * trials or self.next() is None


def play(runs: Runs, cluster: Cluster, runtime: Runtime, *, trials: int) -> Array:
    """Measured runs as the cluster: how much slower the best of the first 1, 2, ... trials is than the best of all, less 1: (trials,)."""
    hunt, regrets = Hunt(runs, cluster, runtime), []
    for _ in range(trials):
        row = hunt.next()
        if row is not None:
            hunt.hear(row, Outcome("ok", seconds=float(runs.seconds[row])))
        best = hunt.best()
        assert best is not None
        regrets.append(runs.seconds[best] / runs.seconds.min() - 1)
    return np.array(regrets)
