"""Ranks start, meet, return and write their logs; who starts them is decided rightly, and a wrong mesh is refused before."""

import functools
import logging
import operator
import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megalite import launch
from megalite.config import Config
from megalite.errors import UserError
from megalite.log import open_voice, plain


def _sum_over_ranks(rank: int) -> torch.Tensor:
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    return total


def test_every_rank_returns_its_result_in_the_order_of_ranks():
    assert launch.run_ranks(3, lambda rank: rank * 10) == [0, 10, 20]


def test_ranks_meet_in_one_process_group():
    assert [total.item() for total in launch.run_ranks(4, _sum_over_ranks)] == [6.0] * 4


def test_four_ranks_come_and_go_in_less_than_a_second():
    launch.run_ranks(4, _sum_over_ranks)
    times = []
    for _ in range(5):  # something else may be at work on this machine
        began = time.monotonic()
        launch.run_ranks(4, _sum_over_ranks)
        times.append(time.monotonic() - began)
    assert min(times) < 1.0


def test_a_result_larger_than_a_pipe_arrives_whole():
    big = launch.run_ranks(2, lambda rank: torch.full((300_000,), float(rank)))
    assert torch.equal(big[1], torch.ones(300_000))


def test_an_early_rank_waits_for_a_late_one():
    def work(rank: int) -> float:
        pair = dist.new_group([0, 1])
        if rank == 2:
            return -1.0  # has nothing more to do, and must not be missed
        time.sleep(0.2 * rank)
        value = torch.tensor(1.0)
        dist.all_reduce(value, group=pair)
        return value.item()

    assert launch.run_ranks(3, work) == [2.0, 2.0, -1.0]


def test_a_rank_sees_the_environment_that_deepspeed_reads():
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR", "OMP_NUM_THREADS")
    seen = launch.run_ranks(2, lambda rank: ([os.environ[name] for name in names], os.environ["MASTER_PORT"], torch.get_num_threads()))
    assert seen[1][0] == ["1", "1", "2", "127.0.0.1", "cpu", "1"]
    assert seen[0][1] == seen[1][1]
    assert seen[1][2] == 1
    assert "RANK" not in os.environ


def test_modules_and_functions_are_warmed_before_the_fork():
    sys.modules.pop("this_is_slow", None)
    warmed = []
    assert launch.run_ranks(2, lambda rank: warmed, warm=("colorsys", lambda: warmed.append(os.getpid()))) == [[os.getpid()]] * 2
    assert "colorsys" in sys.modules


def test_a_fresh_interpreter_can_be_a_rank_as_on_gpus(tmp_path):
    assert launch._run(2, functools.partial(operator.mul, 10), "gloo", fresh=True, folder=tmp_path) == [0, 10]


def test_every_rank_writes_its_log_and_only_rank_0_the_console(tmp_path, capfd):
    def speak(rank: int) -> None:
        print(f"printed by {rank}")
        os.write(2, f"native {rank}\n".encode())
        open_voice(rank, own_log=True)
        logging.getLogger("megalite.test").info("logged by %d", rank)

    launch.run_ranks(2, speak, folder=tmp_path)
    launch.run_ranks(2, speak, folder=tmp_path)
    for rank in (0, 1):
        lines = (tmp_path / f"logs/rank-{rank}.log").read_text().splitlines()
        prefix = f"[rank {rank}] " if rank else ""
        assert sorted(lines) == sorted([f"printed by {rank}", f"native {rank}", f"{prefix}logged by {rank}"] * 2)
    out, err = capfd.readouterr()
    assert out.splitlines() == ["printed by 0", "logged by 0"] * 2
    assert err.splitlines() == ["native 0"] * 2


def test_a_log_keeps_what_a_terminal_shows_in_the_end():
    assert plain(b"\x1b[2K 1/2 bar\r\x1b[2K\x1b[32mstep 1\x1b[0m\r") == b"step 1"


def test_a_mesh_that_does_not_fit_is_refused_before_any_rank_starts(tmp_path):
    config = Config.model_validate({"run": {"folder": str(tmp_path / "run")}, "mesh": {"dp": 2, "pp": 2, "ranks": 3}})
    with pytest.raises(UserError, match=r"= 4, but 3 ranks"):
        launch.start(config, lambda config, rank: (tmp_path / "started").touch())
    assert not (tmp_path / "started").exists()
    assert not (tmp_path / "run").exists()


def test_start_forks_as_many_ranks_as_the_mesh_has_and_fills_it_in(tmp_path):
    config = Config.model_validate({"run": {"folder": str(tmp_path)}, "mesh": {"pp": 2}, "train": {"global_batch": 4}})
    assert launch.start(config, lambda config, rank: (config.mesh.dp, dist.get_world_size(), rank)) == (1, 2, 0)
    assert (tmp_path / "logs/rank-1.log").exists()


SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize("stands_alone", [{}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, SRUN | {"SLURM_NTASKS": "1"}])
def test_no_rank_batch_script_without_srun_and_single_task_stand_alone(stands_alone):
    assert launch.find_place(stands_alone) is None


def test_one_process_speaks_for_a_run(monkeypatch):
    assert launch.is_rank_zero()
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert not launch.is_rank_zero()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launch.is_rank_zero()
