"""How an attempt ended is read from what ranks and srun left behind, and a run is started again as long as that may help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.cluster import history, jobs, sweep
from megalite.cluster.commands import Job
from megalite.cluster.health import check_node, differences
from megalite.cluster.judge import Attempt, choose, find_failure, judge
from megalite.config import load
from megalite.errors import UserError

KILLED = (
    "srun: error: node2: task 1: Killed\nsrun: launch/slurm: _step_signal: Terminating StepId=3.0\nsrun: error: node1: task 0: Terminated\n"
)
ENDED = """srun: error: node1: task 0: Exited with exit code 1
srun: launch/slurm: _step_signal: Terminating StepId=3.0
srun: error: node2: task 1: Killed
"""


def _attempt(folder: Path, *, number: int = 1, code: int = 1, asked: str = "none", said: str = "", **notes: dict[str, Any]) -> Attempt:
    records = folder / f"slurm/7-0-{number}"
    records.mkdir(parents=True)
    (records / "srun.err").write_text(said)
    for name, note in notes.items():
        (records / f"{name.replace('_', '-')}.json").write_text(json.dumps(note))
    return Attempt(records, code, asked, ("node1", "node2"))


def _note(kind: str, report: str, *, rank: int = 0, culprit: int | None = None, time: float = 1.0) -> dict[str, Any]:
    return {"kind": kind, "report": report, "rank": rank, "node": f"node{rank + 1}", "culprit": culprit, "time": time}


def _metrics(folder: Path, step: int) -> None:
    (folder / "metrics.jsonl").write_text(json.dumps({"step": step, "loss": 1.0, "seconds": 2.0, "tokens_per_second": 10.0}) + "\n")


# ---- the culprit -----------------------------------------------------------------------------------------------------------------------


def test_a_killed_rank_is_named_by_srun_and_not_those_that_lost_it(tmp_path: Path) -> None:
    failure = find_failure(_attempt(tmp_path, said=KILLED, rank_0=_note("lost peer", "Connection closed by peer")))
    assert (failure.rank, failure.node, failure.reason) == (1, "node2", "Killed")


def test_a_hung_rank_is_named_by_its_neighbour_though_srun_killed_it_in_the_end(tmp_path: Path) -> None:
    silent = _note("silent", "sees no sign of life of rank 1 for 4 s", culprit=1)
    failure = find_failure(_attempt(tmp_path, said=ENDED, rank_0=silent, start={"hosts": ["node1", "node2"], "world": 2}))
    assert (failure.kind, failure.rank, failure.node) == ("silent", 1, "node2")


def test_a_failed_node_is_named_before_what_ranks_saw_of_it(tmp_path: Path) -> None:
    said = ENDED + "srun: error: Node failure on node2\n"
    assert find_failure(_attempt(tmp_path, said=said, rank_0=_note("lost peer", "reset"))).node == "node2"


def test_the_first_error_counts_and_not_the_lost_peers(tmp_path: Path) -> None:
    notes = {"rank_0": _note("lost peer", "NCCL", time=0.5), "rank_1": _note("error", "KeyError: 'x'", rank=1, time=1.0)}
    failure = find_failure(_attempt(tmp_path, said=ENDED, **notes))
    assert (failure.rank, failure.node, failure.reason) == (1, "node2", "KeyError: 'x'")


def test_ranks_that_were_cancelled_from_outside_are_not_called_killed(tmp_path: Path) -> None:
    said = (
        "slurmstepd-node1: error: *** STEP 3.3 ON node1 CANCELLED AT 2026-11-25T20:35:27 ***\nsrun: error: node1: tasks 0-1: Terminated\n"
    )
    assert find_failure(_attempt(tmp_path, code=143, said=said)).kind == "cancelled"


def test_a_failure_that_nobody_explains_says_so(tmp_path: Path) -> None:
    assert find_failure(_attempt(tmp_path, code=9)).reason == "ended with exit code 9; no rank said why"


# ---- the verdict -----------------------------------------------------------------------------------------------------------------------


def test_a_finished_a_saved_and_a_stopped_run_are_told_apart(tmp_path: Path) -> None:
    assert judge(tmp_path, _attempt(tmp_path, number=1, code=0), same=3)[0] == "finished"
    saved = {"kind": "saved", "asked": "SIGUSR1"}
    assert judge(tmp_path, _attempt(tmp_path, number=2, code=143, outcome=saved), same=3) == ("requeue", "saved: SIGUSR1")
    stopped = {"kind": "saved", "asked": "control/stop"}
    assert judge(tmp_path, _attempt(tmp_path, number=3, code=75, outcome=stopped), same=3)[0] == "stopped"
    assert judge(tmp_path, _attempt(tmp_path, number=4, code=138, asked="SIGUSR1"), same=3)[0] == "requeue"


def test_the_same_failure_at_the_same_step_three_times_is_the_end(tmp_path: Path) -> None:
    _metrics(tmp_path, 5)
    verdicts = [judge(tmp_path, _attempt(tmp_path, number=number, said=KILLED), same=3)[0] for number in range(3)]
    assert verdicts == ["again", "again", "give-up"]
    assert "the same way at the same step 3 times in a row" in history.read(tmp_path, history.ATTEMPTS)[-1]["reason"]


def test_failures_at_other_steps_or_of_other_kinds_are_tried_again_until_they_bring_nothing(tmp_path: Path) -> None:
    verdicts = []
    for number in range(9):
        _metrics(tmp_path, 5 + number % 2)
        verdicts.append(judge(tmp_path, _attempt(tmp_path, number=number, said=KILLED), same=3)[0])
    assert verdicts == ["again"] * 8 + ["give-up"]
    assert "9 failures without a new checkpoint" in history.read(tmp_path, history.ATTEMPTS)[-1]["reason"]


def test_a_new_checkpoint_gives_new_credit(tmp_path: Path) -> None:
    for number in range(12):
        _metrics(tmp_path, number)
        (tmp_path / f"checkpoints/step-{number}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{number}/manifest.json").touch()
        assert judge(tmp_path, _attempt(tmp_path, number=number, said=KILLED), same=3)[0] == "again"


def test_jobs_too_short_to_save_in_come_to_an_end(tmp_path: Path) -> None:
    verdicts = [judge(tmp_path, _attempt(tmp_path, number=number, code=138, asked="SIGUSR1"), same=1)[0] for number in range(3)]
    assert verdicts == ["requeue", "requeue", "give-up"]
    assert "raise slurm.time, or lower slurm.lead" in history.read(tmp_path, history.ATTEMPTS)[-1]["reason"]


def test_bad_input_is_not_tried_again(tmp_path: Path) -> None:
    assert judge(tmp_path, _attempt(tmp_path, code=2, rank_0=_note("user", "data.train = x")), same=3)[0] == "give-up"


# ---- nodes -----------------------------------------------------------------------------------------------------------------------------


def test_as_many_good_nodes_are_taken_as_wanted_and_fewer_where_the_mesh_allows_it() -> None:
    run = load("gpt-7b")  # pp 2 x tp 2, global batch 1024
    take = {"want": 4, "least": 2, "ranks": 8}
    assert choose(run, list("abcdef"), **take) == list("abcd")
    assert choose(run, list("abc"), **take) == list("ab")  # 3 nodes: dp 6 does not divide the batch
    assert choose(run, ["a"], **take) == []
    with pytest.raises(UserError, match="12 ranks were started"):
        choose(load("gpt-7b", overrides={"mesh": {"dp": "4"}}), list("abc"), want=3, least=3, ranks=4)


def test_nodes_that_differ_from_most_are_named() -> None:
    known = [{"node": f"n{number}", "torch": "2.13", "code": "a" if number != 2 else "b"} for number in range(4)]
    assert differences(known) == [("n2", "code is b, elsewhere a")]
    assert differences(known[1:3]) == [("n2", "code is b, elsewhere a")], "without a majority the first is right"


def test_a_node_without_the_gpus_it_should_have_is_not_fit(tmp_path: Path) -> None:
    assert check_node(tmp_path, gpus=0) == []
    assert any("GPUs answer, 99 should" in fault for fault in check_node(tmp_path, gpus=99))


def test_bad_nodes_are_forgiven_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history.append(tmp_path, history.BAD_NODES, node="n1", reason="ECC", job="7")
    assert history.bad_nodes(tmp_path) == history.bad_nodes(tmp_path, job="7") == {"n1": "ECC"}
    assert history.bad_nodes(tmp_path, job="8") == {}
    monkeypatch.setattr(history, "FORGIVEN", -1.0)
    assert history.bad_nodes(tmp_path) == {}


# ---- status ----------------------------------------------------------------------------------------------------------------------------


def test_the_state_of_a_run_is_the_queues_word_or_else_its_last_attempts(tmp_path: Path) -> None:
    assert jobs.find_state(tmp_path, []).word == "not submitted"
    history.append(tmp_path, history.JOBS, job="7", name="pretrain", arguments=[])
    waiting = Job("7", "PENDING", "Priority", "", "1:00:00", str(tmp_path))
    assert jobs.find_state(tmp_path, [waiting]) == jobs.State("7", "pending", "Priority")
    judge(tmp_path, _attempt(tmp_path, code=2, rank_0=_note("user", "loss nan")), same=3)
    assert jobs.find_state(tmp_path, []).word == "failed" and "loss nan" in jobs.find_state(tmp_path, []).why
    history.append(tmp_path, history.JOBS, job="8", name="pretrain", arguments=[])
    assert jobs.find_state(tmp_path, []).job == "8"


def test_jobs_show_folders_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/nowhere")
    _metrics(tmp_path, 5)
    (tmp_path / "config.yaml").write_text("train: {steps: 20}\n")
    said = jobs.show([str(tmp_path)])
    assert "5/20" in said and "(the queue is not known: squeue is not on this machine" in said
    with pytest.raises(UserError, match="is no run folder"):
        jobs.show([str(tmp_path / "nothing")])


def test_a_row_that_failed_stays_in_the_table_with_its_reason(tmp_path: Path) -> None:
    sweep.write(tmp_path, [{"flags": {"lr": 1}, "arguments": [], "refused": None}])
    judge(tmp_path / "row-0", _attempt(tmp_path / "row-0", said=KILLED), same=1)
    assert "failed" in sweep.table(tmp_path) and "rank 1 on node2: Killed" in sweep.table(tmp_path)
