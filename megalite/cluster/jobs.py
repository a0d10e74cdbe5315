"""`megalite jobs`: how the runs are, from their folders, squeue, and sacct where there is accounting.

In: run folders, or the folder that holds them (runs/). Out: a line a run: its job, state, step, loss, tokens a second, time left, and why
it waits or died; of one run, also how each attempt ended. A sweep's folder shows the table of its rows. Works without SLURM, too: the
folders are then all that is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from megalite.cluster import commands, history, sweep
from megalite.errors import UserError

HEAD = ("run", "job", "state", "step", "loss", "tokens/s", "left", "")
SHOWN = 8  # attempts of one run


@dataclass(frozen=True)
class State:
    job: str
    word: str
    why: str


def show(folders: list[str]) -> str:
    """What `megalite jobs FOLDER ...` says; without one, of every run in runs/. Raises UserError for a folder that is no run's."""
    queue, unknown = _queue()
    if len(folders) == 1 and (Path(folders[0]) / sweep.FILE).is_file():
        return sweep.table(Path(folders[0]))
    paths = [Path(name) for name in folders] or sorted(path.parent for path in Path("runs").glob(f"*/{history.FOLDER}"))
    for path in paths:
        if not (path / history.FOLDER).is_dir() and not (path / "config.yaml").is_file():
            raise UserError(f"{path} is no run folder: it holds neither config.yaml nor {history.FOLDER}/")
    if not paths:
        raise UserError("there are no submitted runs in runs/; name a run folder")
    said = [sweep.align([HEAD, *(_line(path, queue) for path in paths)])]
    if len(folders) == 1:
        said += _tries(paths[0])
    return "\n".join([*said, *unknown])


def _queue() -> tuple[list[commands.Job], list[str]]:
    try:
        return commands.queued(), []
    except UserError as error:
        return [], [f"(the queue is not known: {error})"]


def _line(folder: Path, queue: list[commands.Job]) -> tuple[str, ...]:
    known, total = history.last_metrics(folder) or {}, _total(folder)
    state = find_state(folder, queue)
    step, loss, speed = known.get("step"), known.get("loss"), known.get("tokens_per_second")
    left = ""
    if step is not None and total and state.word in ("running", "pending"):
        left = str(timedelta(seconds=round((total - step) * known.get("seconds", 0.0))))
    progress = "" if step is None else f"{step}/{total}" if total else str(step)
    numbers = (progress, "" if loss is None else f"{loss:.4f}", "" if speed is None else f"{speed:,.0f}", left)
    return (str(folder), state.job, state.word, *numbers, state.why)


def find_state(folder: Path, queue: list[commands.Job]) -> State:
    """What the queue says of a run's job, else how its last attempt ended, else what accounting knows."""
    mine = [job for job in queue if job.folder == str(folder.absolute())]
    tries, submitted = history.read(folder, history.ATTEMPTS), history.read(folder, history.JOBS)
    if mine:
        job = mine[-1]
        on = f"on {job.nodes}, {job.left} to its time limit" if job.nodes else job.reason
        again = f"; start {len(tries) + 1}: {tries[-1]['reason']}" if tries else ""
        return State(job.number, job.state.lower(), on + again)
    number = tries[-1]["job"] if tries else submitted[-1]["job"] if submitted else ""
    newer = bool(submitted) and (not tries or submitted[-1]["time"] > tries[-1]["time"])
    if newer:
        number = submitted[-1]["job"]
    elif tries and tries[-1]["verdict"] in ("finished", "stopped", "give-up"):
        word = {"finished": "done", "stopped": "stopped", "give-up": "failed"}[tries[-1]["verdict"]]
        return State(number, word, tries[-1]["reason"])
    if not number:
        return State("", "not submitted", "")
    accounted = commands.ended(number)
    return State(
        number, "gone", f"accounting says {accounted}" if accounted else f"not in the queue any more; see {folder}/{history.FOLDER}/"
    )


def _tries(folder: Path) -> list[str]:
    tries = history.read(folder, history.ATTEMPTS)[-SHOWN:]
    lines = [
        f"{_when(line)}  job {line['attempt']} on {' '.join(line['nodes']) or 'no nodes'}: {line['verdict']}: {line['reason']}"
        for line in tries
    ]
    bad = history.bad_nodes(folder)
    return [*lines, *(f"left out: {node}: {reason}" for node, reason in bad.items())]


def _when(line: dict[str, Any]) -> str:
    return datetime.fromtimestamp(line["time"]).strftime("%m-%d %H:%M:%S")


def _total(folder: Path) -> int | None:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
