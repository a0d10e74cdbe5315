"""How an attempt to train ended, and what the batch script does next.

In: what the ranks and srun left behind, and srun's exit code.  Out: a word (finished, stopped, requeue, again, give-up), a reason and a
culprit, which are kept in the run folder. A failure is tried again until it happened the same way at the same step a few times in a row, or
until many failures brought no new checkpoint; bad input is not tried again.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.cluster import history
from megalite.config import Config
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.observe.switch import STOP

UNFINISHED = 75  # what `megalite train` exits with when it was asked to end, and saved
SETTLE = 5.0  # seconds that a file system over a network may take to show what a rank wrote
DIED = re.compile(r"srun: error: (?P<node>[\w.-]+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)")
NODE_FAILED = re.compile(r"srun: error: Node failure on (?P<node>[\w.-]+)")
ENDED_BY_SRUN = re.compile(r"Terminating (Step|job step)|STEP \S+ ON \S+ CANCELLED")
FRUITLESS = 3  # times slurm.same_failure: failures, or jobs, without a new checkpoint after which a run is given up
ORDER = ("health", "error", "silent", "user", "lost peer")  # whose word counts first: who only noticed comes last


@dataclass(frozen=True)
class Failure:
    """What went wrong, and where, as far as it is known."""

    kind: str
    reason: str
    rank: int | None = None
    node: str | None = None

    @property
    def signature(self) -> str:
        """The same for failures of the same kind, whichever rank, address or second they name."""
        return re.sub(r"0x[0-9a-f]+|\d+|node\S*", "#", f"{self.kind}: {self.reason}")[:160]

    def __str__(self) -> str:
        where = " ".join(
            part for part in (f"rank {self.rank}" if self.rank is not None else "", f"on {self.node}" if self.node else "") if part
        )
        return f"{where}: {self.reason}" if where else self.reason


@dataclass(frozen=True)
class Attempt:
    """One start of the ranks, as the batch script knows it."""

    records: Path
    code: int
    asked: str  # the signal that the batch script passed on, or none
    nodes: tuple[str, ...]

    @property
    def job(self) -> str:
        return self.records.name.split("-")[0]


def judge(folder: Path, attempt: Attempt, *, same: int) -> tuple[str, str]:
    """The verdict and the reason, noted in the run folder."""
    outcome = _read_outcome(attempt)
    if attempt.code == 0 or (outcome and outcome["kind"] == "finished"):
        return _note(folder, attempt, "finished", "all steps are done")
    if attempt.code == UNFINISHED or outcome:
        asked = (outcome or {}).get("asked") or attempt.asked
        if asked == STOP:
            return _note(folder, attempt, "stopped", f"saved: {asked}")
        return _requeue(folder, attempt, f"saved: {asked}", limit=FRUITLESS * same)
    if attempt.asked != "none":
        return _requeue(folder, attempt, f"{attempt.asked} came before anything new could be saved", limit=FRUITLESS * same)
    failure = find_failure(attempt)
    step = (history.last_metrics(folder) or {}).get("step")
    before = _failures_before(folder)
    alike = 1
    for line in reversed(before):
        if (line["signature"], line["step"]) != (failure.signature, step):
            break
        alike += 1
    saved = history.last_checkpoint(folder)
    fruitless = 1 + sum(line["checkpoint"] == saved for line in before)
    told = f"{failure}; last logged step: {step or 'none'}"
    facts = {"signature": failure.signature, "step": step, "checkpoint": saved, "rank": failure.rank, "node": failure.node}
    if failure.kind == "node" and failure.node:
        history.append(folder, history.BAD_NODES, node=failure.node, reason=failure.reason, job=attempt.job)
    if failure.kind == "user":
        return _note(folder, attempt, "give-up", f"{told}; trying again would not help", **facts)
    if alike >= same:
        return _note(folder, attempt, "give-up", f"{told}; the same way at the same step {alike} times in a row", **facts)
    if fruitless >= FRUITLESS * same:
        return _note(folder, attempt, "give-up", f"{told}; {fruitless} failures without a new checkpoint", **facts)
    return _note(folder, attempt, "again", told, **facts)


def _requeue(folder: Path, attempt: Attempt, reason: str, *, limit: int) -> tuple[str, str]:
    """Go on in the next job, unless many jobs got no further: their time is too short to start and save in."""
    saved, jobs = history.last_checkpoint(folder), 1
    for line in reversed(history.read(folder, history.ATTEMPTS)):
        if line["verdict"] != "requeue" or line.get("checkpoint", -1) != saved:
            break
        jobs += 1
    if jobs >= limit:
        reason = f"{reason}; {jobs} jobs in a row without a new checkpoint: raise slurm.time, or lower slurm.lead"
    return _note(folder, attempt, "give-up" if jobs >= limit else "requeue", reason, checkpoint=saved)


def find_failure(attempt: Attempt) -> Failure:
    """The first cause that ranks and srun tell of."""
    path = attempt.records / "srun.err"
    said = path.read_text(errors="replace") if path.is_file() else ""
    if found := NODE_FAILED.search(said):
        return Failure("node", "the node failed", node=found["node"])
    if (died := _first_death(said)) and not died.reason.startswith("Exited"):
        return died
    entries = [note for path in attempt.records.glob("rank-*.json") if (note := history.read_note(path))]
    if entries:
        first = min(entries, key=lambda note: (ORDER.index(note["kind"]), note["time"]))
        nobody = first["kind"] in ("lost peer", "health")
        culprit = first["culprit"] if first["culprit"] is not None or nobody else first["rank"]
        return Failure(first["kind"], first["report"], culprit, _node_of(culprit, attempt, first))
    if not attempt.nodes:
        return Failure("health", f"the check of all nodes together ended with exit code {attempt.code} (124: it took too long)")
    if not died and "CANCELLED" in said:
        return Failure("cancelled", "SLURM, or scancel, ended the ranks before they were listening")
    return died or Failure("unknown", f"ended with exit code {attempt.code}; no rank said why")


def _first_death(said: str) -> Failure | None:
    """What srun says of the first task that ended badly, before it ended the others."""
    for line in said.splitlines():
        if ENDED_BY_SRUN.search(line):
            return None
        if found := DIED.search(line):
            tasks = found["tasks"]
            return Failure("death", found["how"], int(tasks) if tasks.isdigit() else None, found["node"])
    return None


def _node_of(rank: int | None, attempt: Attempt, note: dict[str, Any]) -> str | None:
    if rank == note["rank"]:
        return note["node"]
    start = history.read_note(attempt.records / "start.json") or {}
    hosts, world = start.get("hosts") or attempt.nodes, start.get("world")
    if rank is None or not hosts or not world or world % len(hosts):
        return None
    return hosts[rank * len(hosts) // world]  # srun fills one node after the other


def _read_outcome(attempt: Attempt) -> dict[str, Any] | None:
    until = time.monotonic() + (SETTLE if attempt.code else 0.0)
    while (outcome := history.read_note(attempt.records / "outcome.json")) is None and time.monotonic() < until:
        if attempt.code not in (UNFINISHED, 137, 143):  # neither saved nor ended while it was leaving
            break
        time.sleep(0.2)
    return outcome


def _failures_before(folder: Path) -> list[dict[str, Any]]:
    """Failures since the last attempt that did what it was asked to do."""
    lines = history.read(folder, history.ATTEMPTS)
    for at in range(len(lines) - 1, -1, -1):
        if lines[at]["verdict"] != "again":
            return lines[at + 1 :]
    return lines


def _note(folder: Path, attempt: Attempt, verdict: str, reason: str, **facts: Any) -> tuple[str, str]:
    known = {"job": attempt.job, "attempt": attempt.records.name, "code": attempt.code, "nodes": attempt.nodes}
    history.append(folder, history.ATTEMPTS, verdict=verdict, reason=reason, **known, **facts)
    return verdict, reason


# ---- which nodes to train on -----------------------------------------------------------------------------------------------------------


def choose(config: Config, good: list[str], *, want: int, least: int, ranks: int) -> list[str]:
    """As many of the good nodes as are wanted, or at least `least`, such that the mesh fits; none where there are too few."""
    for number in range(min(want, len(good)), least - 1, -1):
        try:
            if number * ranks > 1:  # one task alone brings its ranks to life itself
                resolve_mesh(config, number * ranks)
        except UserError:
            if number == least:
                raise
            continue
        return good[:number]
    return []
