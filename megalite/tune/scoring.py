"""`megalite tune --score FILE.csv --runtime R --cluster C`: the errors of predictions as a table, and the constants that the runs give.

In: a table of measured runs (score.py says which columns).  Out: lines on the console.
"""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import yaml
from rich.table import Table

from megalite.log import open_console
from megalite.tune import fitting, search
from megalite.tune.cluster import Cluster
from megalite.tune.runtime import DESIGN, Runtime
from megalite.tune.score import Runs, Score, predict_memory, predict_time, read_runs, score
from megalite.tune.trials import play

SAID = {
    "timed": ("runs with a step time", "{:.0f}"),
    "weighed": ("runs with a peak memory", "{:.0f}"),
    "time_mean": ("step time, mean error", "{:.1%}"),
    "time_median": ("step time, median error", "{:.1%}"),
    "memory_median": ("memory, median error", "{:.1%}"),
    "false_fits": ("said to fit, but failed", "{:.1%}"),
    "false_memory": ("the same, but nothing that needs as much ran", "{:.1%}"),
    "false_misses": ("said not to fit, but ran", "{:.1%}"),
    "rank": ("rank correlation within a cell, mean", "{:.3f}"),
    "top_five": ("cells whose best is among our five", "{:.0%}"),
    "regret": ("our first choice over the best, mean", "{:.1%}"),
}


def score_table(name: str, cluster: Cluster, runtime: Runtime, *, held_out: bool, fitted: bool, played: int = 0) -> int:
    """Print the errors; `played`: and what so many trials would have found in each cell; returns 0."""
    runs = read_runs(Path(name), runtime)
    if held_out:  # from constants that have seen no table
        seconds, held = fitting.hold_out(runs, cluster, DESIGN[runtime.name])
    else:
        seconds, held = predict_time(runs, cluster, runtime), predict_memory(runs, runtime)
    console = open_console()
    how = "each run by constants fitted to the others" if held_out else f"constants: {runtime.fitted or 'none fitted'}"
    console.print(f"{name}, {runtime.name} on {cluster.name}; {how}", markup=False)
    console.print(_table(score(runs, seconds, held, limit=search.limit(cluster, runtime))))
    if played:
        console.print(_regrets(runs, cluster, DESIGN[runtime.name], trials=played))
    if fitted:
        entry = fitting.as_entry(fitting.fit(runs, cluster, DESIGN[runtime.name]), kinds=[cluster.kind], fitted=Path(name).name)
        console.print(yaml.safe_dump([entry], sort_keys=False), markup=False)
    return 0


def _regrets(runs: Runs, cluster: Cluster, runtime: Runtime, *, trials: int) -> Table:
    """Of cells of five runs or more, by constants that have seen no table."""
    timed = np.isfinite(runs.seconds) & ~runs.failed
    cells = [runs.take(timed & (runs.cell == cell)) for cell in np.unique(runs.cell[timed]) if (timed & (runs.cell == cell)).sum() >= 5]
    found = np.array([play(cell, cluster, runtime, trials=trials) for cell in cells]).reshape(len(cells), trials)
    table = Table(f"best of the trials over the best of the cell, {len(cells)} cells", "mean", "worst", "within 1 %")
    for number, column in enumerate(found.T if len(cells) else [], 1):
        table.add_row(f"{number} trials", f"{column.mean():.1%}", f"{column.max():.1%}", f"{(column <= 0.01).mean():.0%}")
    return table


def _table(found: Score) -> Table:
    table = Table("predicted beside measured", "")
    for field in fields(found):
        text, form = SAID[field.name]
        value = getattr(found, field.name)
        table.add_row(text, "not in the table" if math.isnan(value) else form.format(value))
    return table
