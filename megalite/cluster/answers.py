"""`megalite cluster WORD ...`: what the batch scripts of slurm/ ask of a run folder. Answers go to stdout, reasons to stderr.

    folder ARGUMENTS...                  the absolute run folder of `megalite train ARGUMENTS...`
    bad-nodes FOLDER [JOB]               the nodes to leave out, one a line
    note-bad FOLDER RECORDS NODE         leave out this node, whose check failed
    choose FOLDER WANT LEAST RANKS LIMIT "NODE ..." ARGUMENTS...
                                         the nodes to train on; exit code 3: too few, 2: the mesh does not fit, 4: too many were bad
    judge FOLDER RECORDS CODE ASKED SAME "NODE ..."
                                         finished, stopped, requeue, again or give-up
    row FOLDER NUMBER                    the arguments of a sweep's row, one a line
    table FOLDER                         the results of a sweep so far

Nothing here imports torch, so an answer takes half a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megalite.cluster import history, sweep
from megalite.cluster.judge import Attempt, choose, judge
from megalite.config import Config, run_folder
from megalite.errors import UserError

TOO_FEW, TOO_MANY_BAD = 3, 4


def answer(words: list[str], *, read_run: Callable[[list[str]], Config]) -> int:
    """Answer one question; returns the exit code. `read_run` makes a run of the arguments of `megalite train`."""
    answers = {
        "folder": lambda words: _folder(read_run(words)),
        "bad-nodes": _bad_nodes,
        "note-bad": _note_bad,
        "choose": lambda words: _choose(words[:6], read_run(words[6:])),
        "judge": _judge,
        "row": _row,
        "table": _table,
    }
    if not words or words[0] not in answers:
        raise UserError(f"megalite cluster is for batch scripts and answers to {', '.join(answers)}")
    return answers[words[0]](words[1:])


def _folder(config: Config) -> int:
    _answer(str(run_folder(config).absolute()))
    return 0


def _bad_nodes(words: list[str]) -> int:
    for node in history.bad_nodes(Path(words[0]), job=words[1] if len(words) > 1 else None):
        _answer(node)
    return 0


def _note_bad(words: list[str]) -> int:
    folder, records, node = Path(words[0]), Path(words[1]), words[2]
    note = history.read_note(records / f"health-{node}.json")
    reason = "; ".join(note["faults"]) if note and note["faults"] else "its check did not answer, or could not be started"
    history.append(folder, history.BAD_NODES, node=node, reason=reason, job=records.name.split("-")[0])
    _tell(f"{node} is bad: {reason}")
    return 0


def _choose(words: list[str], config: Config) -> int:
    folder, want, least, ranks, limit, good = words
    bad = history.bad_nodes(Path(folder))
    if len(bad) > int(limit):
        _tell(f"{len(bad)} nodes were bad ({', '.join(bad)}), slurm.max_excluded = {limit}: look for what they have in common")
        return TOO_MANY_BAD
    nodes = choose(config, good.split(), want=int(want), least=int(least), ranks=int(ranks))
    if not nodes:
        _tell(f"{len(good.split())} good nodes, {least} needed")
        return TOO_FEW
    _answer(" ".join(nodes))
    return 0


def _judge(words: list[str]) -> int:
    folder, records, code, asked, same, nodes = words
    attempt = Attempt(Path(records), int(code), asked if asked == "none" else f"SIG{asked}", tuple(nodes.split()))
    verdict, reason = judge(Path(folder), attempt, same=int(same))
    _tell(f"{verdict}: {reason}")
    _answer(verdict)
    return 0


def _row(words: list[str]) -> int:
    for word in sweep.arguments(Path(words[0]), int(words[1])):
        _answer(word)
    return 0


def _table(words: list[str]) -> int:
    _answer(sweep.table(Path(words[0])))
    return 0


def _answer(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def _tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
