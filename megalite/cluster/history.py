"""What a run's jobs left behind: RUN_FOLDER/slurm/, written by `megalite submit`, the batch script and the ranks.

In: a run folder.  Out: the jobs that were submitted, how each attempt ended, which nodes were bad, and how far the run is. Lines of JSON,
appended, so that a half-written one at the end costs nothing but itself.

    slurm/jobs.jsonl         a line a submission: job, time, command
    slurm/attempts.jsonl     a line for each time the ranks were started: job, nodes, verdict, reason, step
    slurm/bad-nodes.jsonl    a line a node that was left out: job, node, reason
    slurm/JOB-RESTART-N/     what the ranks of one attempt noted: rank-R.json where rank R failed, outcome.json, start.json; srun.err
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "slurm"
JOBS, ATTEMPTS, BAD_NODES = "jobs.jsonl", "attempts.jsonl", "bad-nodes.jsonl"
FORGIVEN = 24 * 3600.0  # seconds after which a node that was bad may have been mended
TAIL = 1 << 16  # bytes of metrics that surely hold a whole line


def append(folder: Path, file_name: str, **facts: Any) -> None:
    """A line for one of the files, with the time."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    with (folder / FOLDER / file_name).open("a") as file:
        file.write(json.dumps({"time": time.time(), **facts}) + "\n")


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of one of the files, the oldest first; none where there is none."""
    path = folder / FOLDER / name
    return list(_lines(path.read_text())) if path.is_file() else []


def read_note(path: Path) -> dict[str, Any] | None:
    """One file of an attempt; None where it is not there, or not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def bad_nodes(folder: Path, *, job: str | None = None) -> dict[str, str]:
    """Node -> why it is left out, of the last day; of one job, if it is named."""
    since = time.time() - FORGIVEN
    found = read(folder, BAD_NODES)
    return {line["node"]: line["reason"] for line in found if line["time"] > since and job in (None, line["job"])}


def last_metrics(folder: Path) -> dict[str, Any] | None:
    """The last logged step of a run."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
            text = file.read().decode(errors="replace")
    except OSError:
        return None
    trained = [line for line in _lines(text) if "loss" in line]
    return trained[-1] if trained else None


def last_checkpoint(folder: Path) -> int | None:
    """The step of the newest checkpoint that was written to its end."""
    steps = [int(path.parent.name[5:]) for path in folder.glob("checkpoints/step-*/manifest.json") if path.parent.name[5:].isdigit()]
    return max(steps, default=None)


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the first of a tail, or one that a killed process left
            continue
