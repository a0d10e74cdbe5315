"""Whatever befalls a rank or the parent, the run ends within seconds, says why, and leaves no process behind."""

import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megalite import crew, launch
from megalite.config import Config
from megalite.crew import Failure, Rank, RankError
from megalite.errors import UserError


def _wait_for_others(rank: int, folder: Path) -> None:
    """Leave the process id in a file, then hang in a collective that rank 0 never joins."""
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(300) if rank == 0 else dist.all_reduce(torch.ones(1))


def _pids(folder: Path, count: int) -> list[int]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        texts = [path.read_text() for path in folder.glob("pid-*")]
        if len(texts) == count and all(texts):
            return [int(text) for text in texts]
        time.sleep(0.01)
    raise AssertionError(f"{count} ranks did not start")


def _all_gone(pids: list[int], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
            return True
        time.sleep(0.01)
    return False


def _fail(rank: int, culprit: int, folder: Path, how: str) -> None:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    dist.barrier()
    if rank == culprit:
        if how == "raise":
            raise ArithmeticError("the culprit's own words")
        if how == "user":
            raise UserError("train.steps = 0, but at least 1 is needed; raise train.steps")
        if how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(("how", "words"), [("raise", "culprit's own words"), ("kill", "SIGKILL"), ("exit", "exited with code 3")])
def test_a_failing_rank_takes_the_run_down_in_seconds_and_is_named(tmp_path, how, words):
    began = time.monotonic()
    with pytest.raises(RankError, match=words) as caught:
        launch.run_ranks(4, functools.partial(_fail, culprit=2, folder=tmp_path, how=how))
    assert time.monotonic() - began < 4
    assert caught.value.rank == 2
    assert _all_gone(_pids(tmp_path, 4), seconds=0.1)


def test_the_report_holds_the_ranks_traceback_and_so_does_its_log(tmp_path):
    with pytest.raises(RankError, match=r"in _fail\n.*raise ArithmeticError"):
        launch.run_ranks(2, functools.partial(_fail, culprit=1, folder=tmp_path, how="raise"), folder=tmp_path)
    assert "in _fail" in (tmp_path / "logs/rank-1.log").read_text()


def test_of_two_failures_the_earlier_is_reported():
    failures = {0: Failure(3.0, "late"), 1: Failure(1.0, "lost a neighbour", lost_peer=True), 2: Failure(2.0, "first of its own")}
    ranks = [Rank(number, -1, Pipe()[0], alive=False, failure=failure) for number, failure in failures.items()]
    with pytest.raises(RankError, match="rank 2 first of its own"):
        crew._raise_first(ranks, [], None)


def test_a_lost_connection_is_not_mistaken_for_the_cause():
    def work(rank: int) -> None:
        if rank == 0:
            raise ConnectionResetError("Connection reset by peer")
        time.sleep(0.3)
        raise ArithmeticError("the cause")

    with pytest.raises(RankError, match="the cause"):
        launch.run_ranks(2, work)


def test_bad_input_found_by_a_rank_stays_one_line(tmp_path):
    with pytest.raises(UserError) as caught:
        launch.run_ranks(2, functools.partial(_fail, culprit=1, folder=tmp_path, how="user"))
    assert str(caught.value) == "train.steps = 0, but at least 1 is needed; raise train.steps"


def test_a_rank_that_ignores_sigterm_is_ended_too(tmp_path):
    def work(rank: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / f"pid-{rank}").write_text(str(os.getpid()))
        dist.barrier()
        if rank == 1:
            raise ArithmeticError
        time.sleep(300)

    with pytest.raises(RankError):
        launch.run_ranks(2, work)
    assert _all_gone(_pids(tmp_path, 2), seconds=0.1)


def test_a_process_that_a_rank_started_goes_with_it(tmp_path):
    def work(rank: int) -> None:
        child = subprocess.Popen(["sleep", "300"])
        (tmp_path / f"pid-{rank}").write_text(str(child.pid))
        dist.barrier()
        if rank == 0:
            raise ArithmeticError

    with pytest.raises(RankError):
        launch.run_ranks(2, work)
    assert _all_gone(_pids(tmp_path, 2))


@pytest.mark.parametrize(("late", "named"), [({1}, "2 of 3 ranks were there in time; missing: 1$"), ({0, 1, 2}, "missing: 0, 1, 2$")])
def test_ranks_that_do_not_arrive_are_named_after_the_timeout(monkeypatch, late, named):
    announce = launch._announce

    def oversleep(orders, rank):
        time.sleep(300) if rank in late else announce(orders, rank)

    monkeypatch.setattr(launch, "_announce", oversleep)
    with pytest.raises(RankError, match=named) as caught:
        launch.run_ranks(3, lambda rank: None, timeout=1)
    assert caught.value.rank == min(late)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_parent_that_is_ended_takes_its_ranks_along_without_a_word(tmp_path, number, code):
    config = Config.model_validate({"run": {"folder": str(tmp_path)}, "mesh": {"dp": 3}, "train": {"global_batch": 3}})
    parent = os.fork()
    if parent == 0:
        tempfile.tempdir = str(tmp_path)  # what it cannot clear away when killed
        try:
            with (tmp_path / "console").open("w") as console:
                os.dup2(console.fileno(), 1)
                os.dup2(console.fileno(), 2)
            launch.start(config, lambda config, rank: _wait_for_others(rank, tmp_path))
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(77)
    pids = _pids(tmp_path, 3)
    began = time.monotonic()
    os.kill(parent, number)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == code
    assert _all_gone(pids)
    assert time.monotonic() - began < crew.GRACE  # asked to end, they need not be forced
    assert (tmp_path / "console").read_text() == ""


JOINER = """
import sys, torch, torch.distributed as dist
from megalite import crew, launch
from megalite.config import Config

def work(config, rank):
    total = torch.ones(1)
    dist.all_reduce(total)
    print("rank", rank, "of", config.mesh.dp, "sums to", total.item(), flush=True)
    if sys.argv[2] == "fail" and rank == 1:
        raise ArithmeticError("rank 1 cannot go on")

launch.start(Config.model_validate({"run": {"folder": sys.argv[1]}, "train": {"global_batch": 2}}), work)
"""


@pytest.mark.parametrize("how", ["work", "fail"])
def test_ranks_that_srun_started_join_and_a_failing_one_speaks_up(tmp_path, how):
    slurm = {"SLURM_JOB_ID": f"{os.getpid()}", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2"}
    command = [sys.executable, "-c", JOINER, str(tmp_path), how]
    ranks = [
        subprocess.Popen(command, env=os.environ | slurm | {"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{rank}"}, stdout=-1, stderr=-1)
        for rank in (0, 1)
    ]
    try:
        said = {1: ranks[1].communicate(timeout=60)}
        if how == "fail":  # srun would end the other
            ranks[0].kill()
        said[0] = ranks[0].communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
    assert b"rank 0 of 2 sums to 2.0" in said[0][0]
    assert said[1][0] == b""
    assert "rank 0 of 2 sums to 2.0" in (tmp_path / "logs/rank-0.log").read_text()
    assert "rank 1 of 2 sums to 2.0" in (tmp_path / "logs/rank-1.log").read_text()
    assert ranks[1].returncode == (1 if how == "fail" else 0)
    assert (b"ArithmeticError: rank 1 cannot go on" in said[1][1]) == (how == "fail")
