"""`megalite tune --trials N`: the best layouts run for a few steps, here or as SLURM jobs, and the ranking made anew after each.

In: what the search found, and a way to run `megalite bench`.  Out: a `Hunt` that knows what was measured, and FOLDER/results.json, .csv,
.md and .html with a folder a trial beside them. Started again, it takes over what it has measured of the same run; a trial that failed is a
row. trials.py decides what is tried next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megalite import hardware
from megalite.config import Config
from megalite.errors import UserError
from megalite.hardware import GIB
from megalite.tune import choices, report, search
from megalite.tune.cases import Start, run_case
from megalite.tune.score import Runs
from megalite.tune.search import Found
from megalite.tune.shape import Shape
from megalite.tune.trials import Hunt, Outcome

STEPS, WARM_UP = 15, 5
CHOICE = 512  # layouts that trials may come to, the best by prediction


def confirm(
    found: Found, *, trials: int, folder: Path, timeout: float, start: Start, write: Callable[[int, Path], Path], say: Callable[[str], None]
) -> tuple[Hunt, list[int]]:
    """Try layouts until `trials` of them have run; the hunt, and which row of `found` each of its rows is.

    `write` puts a row's run file into a folder and returns its name; `timeout` is the seconds that a trial may take.
    """
    rows = found.best(CHOICE)
    hunt = Hunt(_runs(found, rows), found.cluster, search.for_precision(found.runtime, found.config))
    known = report.read(str(folder / "results.json")) if (folder / "results.json").exists() else []
    results: list[dict[str, Any]] = []
    while not hunt.is_over(trials):
        at = hunt.next()
        assert at is not None, "a hunt without a next row is over"
        words, number = choices.say(found.judged.layouts.row(rows[at])), len(results) + 1
        asked = {"words": words, "run": _what_counts(choices.as_config(found.config, found.judged.layouts.row(rows[at])))}
        expected = hunt.seconds[at]
        done = next((entry for entry in known if entry.get("trial") == asked and entry.get("status") != "lost"), None)
        if done is None:
            run = write(rows[at], folder / f"trial-{number}")
            flags = ["--steps", f"{STEPS}", "--warm-up", f"{WARM_UP}"]
            done = run_case([str(run), *flags], folder / f"trial-{number}", timeout=timeout, start=start)
            done = {**done, "layout": words} if done.get("status", "ok") != "ok" else done
        _check_device(done, found)
        results.append({**done, "trial": asked})
        report.write(results, folder)
        outcome = _outcome(done, context=hunt.runtime.memory.context)
        hunt.hear(at, outcome)
        said = (
            f"{outcome.seconds:.3f} s a step, predicted {expected:.3f}" if outcome.status == "ok" else f"{outcome.status}: {outcome.reason}"
        )
        say(f"trial {number}      {words}: {said}")
    say(f"written      {folder}/results.json, .csv, .md, .html")
    return hunt, rows


def _check_device(result: dict[str, Any], found: Found) -> None:
    """Raises UserError where a trial ran on another kind of device than the cluster is said to have."""
    wanted = found.cluster.gpu
    if result.get("status", "ok") == "ok" and wanted.pattern and hardware.find(result["device"]) != wanted:
        raise UserError(
            f"the trial ran on {result['device']}, but --cluster {found.cluster.name} has {wanted.name}; choose the nodes' kind"
        )


def _runs(found: Found, rows: list[int]) -> Runs:
    nothing = np.full(len(rows), np.nan)
    layouts = found.judged.layouts.take(np.array(rows))
    return Runs(Shape.of(found.config), layouts, nothing, nothing, np.zeros(len(rows), bool), np.zeros(len(rows), int))


def _what_counts(config: Config) -> dict[str, Any]:
    """Of a run, what its time and memory depend on."""
    document = config.model_dump(mode="json", include={"model", "mesh", "train"})
    document["train"].pop("steps", None)
    return {**document, "sequence": config.sequence}


def _outcome(result: dict[str, Any], *, context: float) -> Outcome:
    if result.get("status", "ok") != "ok":
        return Outcome(result["status"], reason=result["reason"])
    on_gpu = result["mfu"] is not None  # what a process on a CPU holds is not what the prediction counts
    memory = result["memory_bytes"] + context if on_gpu else float("nan")  # torch counts tensors; CUDA's context is beside them
    return Outcome("ok", seconds=result["seconds"]["median"], memory=memory)


def learned(found: Found, hunt: Hunt) -> Found:
    """All layouts judged by the constants that the trials gave."""
    ran = sum(outcome.status == "ok" for outcome in hunt.tried.values())
    if not ran:
        return found
    known = replace(hunt.known, fitted=f"{ran} trials on {found.cluster.name}, starting from: {hunt.runtime.fitted}")
    judged = search.judge(found.config, found.judged.layouts, found.cluster, known)
    return replace(found, runtime=known, judged=judged, order=search.ranked(judged))


def table(found: Found, hunt: Hunt, rows: list[int]) -> Table:
    """What was tried, the fastest first; predicted is what the constants of before said."""
    before = Hunt(hunt.runs, hunt.cluster, hunt.runtime)
    tokens = found.config.train.global_batch * found.config.sequence / found.cluster.world
    shown = Table("trial", "tokens/s a GPU", "predicted", "GiB of a GPU", "predicted")
    for at in sorted(hunt.tried, key=lambda row: (np.isnan(hunt.tried[row].seconds), hunt.tried[row].seconds)):
        outcome = hunt.tried[at]
        measured = f"{tokens / outcome.seconds:,.0f}" if outcome.status == "ok" else outcome.status
        held = "" if np.isnan(outcome.memory) else f"{outcome.memory / GIB:.1f}"
        words = choices.say(found.judged.layouts.row(rows[at]))
        shown.add_row(words, measured, f"{tokens / before.seconds[at]:,.0f}", held, f"{before.memory[at] / GIB:.1f}")
    return shown
