"""Killed at any moment of saving, renaming or pruning, a run has a whole checkpoint, and what else lies there is in nobody's way."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from toy import LAYOUTS, TIED, WARM, own, read, write

from megalite.checkpoint import retention, store
from megalite.checkpoint.inspection import inspect
from megalite.checkpoint.store import Store
from megalite.config import Checkpoint
from megalite.launch import run_ranks

PAIR = LAYOUTS[1]


def _save_forever(folder: Path, rank: int) -> None:
    with Store(folder, Checkpoint(keep=2), tied=TIED) as opened:
        for step in range(2, 10_000, 2):
            opened.save(step, own(PAIR, rank, fill=True), {"config": {"name": "toy"}})


def kill_while_saving(folder: Path, seconds: float) -> list[int]:
    """Save and prune without a pause, kill everything after that long; the steps that are whole."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with contextlib.suppress(BaseException):
            run_ranks(2, lambda rank: _save_forever(folder, rank), warm=WARM)
        os._exit(1)
    until = time.monotonic() + 20
    while not (folder / "latest").exists() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    time.sleep(0.05)  # the ranks die of their parent's death
    found = store.whole(folder)
    assert found, "no whole checkpoint is left"
    for path in found:
        assert not inspect(path).damage, path
    return [retention.step_of(path) for path in found]


@pytest.mark.parametrize("seconds", [0.003, 0.041, 0.078, 0.119])
def test_killed_at_any_moment_of_saving_or_pruning_every_step_n_is_whole(tmp_path: Path, seconds: float) -> None:
    kill_while_saving(tmp_path, seconds)
    write(tmp_path, LAYOUTS[0], 20_000, keep=1)  # and what lies there does not stand in the way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-20000"]
    read(tmp_path / "latest", LAYOUTS[2])


@pytest.mark.slow
def test_killed_at_two_hundred_moments(tmp_path: Path) -> None:
    for number in range(200):
        folder = tmp_path / f"{number}"
        kill_while_saving(folder, number * 0.0011)
        shutil.rmtree(folder)
