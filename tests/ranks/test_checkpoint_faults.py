"""A disk that is full or fails, a second job, a kill at any moment: it is said, training goes on where it can, what was whole stays so."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from toy import LAYOUTS, TIED, WARM, own, read, write

from megalite.checkpoint import lock, retention, storage, store
from megalite.checkpoint.inspection import inspect
from megalite.checkpoint.store import Store
from megalite.config import Checkpoint
from megalite.errors import UserError
from megalite.launch import run_ranks

PAIR = LAYOUTS[1]


def _steps(folder: Path) -> list[int]:
    return [retention.step_of(path) for path in store.whole(folder)]


# ---- retention -------------------------------------------------------------------------------------------------------------------------


def test_every_so_many_steps_and_the_best_stay_beside_the_newest(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 6.0, 5: 3.5, 6: 7.0, 7: 8.0}

    def work(rank: int) -> None:
        with Store(tmp_path, Checkpoint(keep=1, keep_every=3, keep_best=True), tied=TIED) as opened:
            for step, loss in losses.items():
                opened.save(step, own(PAIR, rank, fill=True), {"config": {}, "valid": {"tokens": loss}, "valid_step": step})

    run_ranks(2, work, warm=WARM)
    assert _steps(tmp_path) == [2, 3, 6, 7]


def test_a_loss_measured_at_another_step_does_not_make_a_checkpoint_the_best(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with Store(tmp_path, Checkpoint(keep=1, keep_best=True), tied=TIED) as opened:
            for step, loss, measured in ((1, 4.0, 1), (2, 3.0, 1), (3, 5.0, 3)):
                opened.save(step, own(PAIR, rank, fill=True), {"config": {}, "valid": {"tokens": loss}, "valid_step": measured})

    run_ranks(2, work, warm=WARM)
    assert _steps(tmp_path) == [1, 3]


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(retention, "remove", refuse)
    write(tmp_path, PAIR, 2, 4, keep=1)
    assert _steps(tmp_path) == [2, 4]


# ---- the disk --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "in the background"])
@pytest.mark.parametrize(("culprit", "moment"), [(1, "file"), (0, "file"), (0, "manifest"), (0, "folder")])
def test_a_full_or_failing_disk_costs_one_checkpoint_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, culprit: int, moment: str
) -> None:
    real = os.fsync

    def work(rank: int) -> tuple[list[str | None], list[str]]:
        said: list[str] = []
        store.LOG.addHandler(handler := logging.Handler())
        handler.emit = lambda record: said.append(record.getMessage())

        def fail(handle: int) -> None:
            name = Path(f"/proc/self/fd/{handle}").resolve().name
            if (
                step == 4
                and rank == culprit
                and {"file": ".distcp", "manifest": "manifest.json", "folder": "step-4.partial"}[moment] in name
            ):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            real(handle)

        monkeypatch.setattr(os, "fsync", fail)
        outcomes = []
        with Store(tmp_path, Checkpoint(background=background), tied=TIED) as opened:
            for step in (2, 4, 6):
                opened.save(step, own(PAIR, rank, fill=True), {"config": {"name": "toy"}})
                outcomes.append(opened.settle())
                if step == 4:
                    assert not (tmp_path / "step-4.partial").exists(), "what is half-written takes room"
        return outcomes, said

    outcomes = run_ranks(2, work, warm=WARM)
    for (first, failed, last), _ in outcomes:
        assert first is None and last is None
        assert failed is not None and "No space left on device" in failed
    assert any("step-4 could not be saved" in line and "step-2 stays the newest" in line for line in outcomes[0][1])
    assert not outcomes[1][1], "one rank speaks for all"
    assert _steps(tmp_path) == [2, 6]
    assert read(tmp_path / "latest", LAYOUTS[2])["step"] == 6


def test_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small tmpfs can be mounted by root alone")
    try:

        def work(rank: int) -> list[str | None]:
            outcomes = []
            with Store(small, Checkpoint(), tied=TIED) as opened:
                for step in (2, 4, 6):
                    if rank == 0 and step == 4:
                        free = os.statvfs(small)
                        (small / "ballast").write_bytes(bytes(free.f_bavail * free.f_bsize - (20 << 10)))
                    if rank == 0 and step == 6:
                        (small / "ballast").unlink()
                    opened.save(step, own(PAIR, rank, fill=True), {"config": {"name": "toy"}})
                    outcomes.append(opened.settle())
            return outcomes

        first, full, last = run_ranks(2, work, warm=WARM)[0]
        assert first is None and last is None and full is not None and "No space left on device" in full
        assert _steps(small) == [2, 6]
        read(small / "step-6", LAYOUTS[2])
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_mistake_of_our_own_is_not_taken_for_a_failing_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise KeyError("our own mistake")

    monkeypatch.setattr(storage, "_pack", wrong)
    with pytest.raises(Exception, match="our own mistake"):
        write(tmp_path, PAIR, 2)


# ---- in the background -----------------------------------------------------------------------------------------------------------------


def test_what_is_saved_in_the_background_is_what_was_there_when_the_save_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training writes into the very tensors at once; two saves never overlap; the next one waits."""
    real, under_way, most = storage.Writer.write_data, 0, 0

    def slow(self: Any, *arguments: Any) -> Any:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        time.sleep(0.3)
        under_way -= 1
        assert threading.current_thread() is not threading.main_thread()
        return real(self, *arguments)

    monkeypatch.setattr(storage.Writer, "write_data", slow)

    def work(rank: int) -> tuple[list[float], int]:
        held, stalls = own(PAIR, rank, fill=True), []
        with Store(tmp_path, Checkpoint(), tied=TIED) as opened:
            for step in (2, 4):
                for piece, fresh in zip(held, own(PAIR, rank, fill=True), strict=True):
                    piece.master.copy_(fresh.master)
                    for kind, moment in piece.moments.items():
                        moment.copy_(fresh.moments[kind])
                began = time.monotonic()
                opened.save(step, held, {"config": {"name": "toy"}})
                stalls.append(time.monotonic() - began)
                for piece in held:
                    piece.master.fill_(7)
                    for moment in piece.moments.values():
                        moment.fill_(7)
        return stalls, most

    (first, second), most = run_ranks(2, work, warm=WARM)[0]
    assert first < 0.2 < second, "the first save holds nobody up, the second waits for it"
    assert most == 1
    for step in (2, 4):
        read(tmp_path / f"step-{step}", LAYOUTS[2])


def test_what_goes_wrong_in_the_background_is_raised_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any) -> None:
        raise KeyError("our own mistake")

    monkeypatch.setattr(storage, "_pack", wrong)

    def work(rank: int) -> None:
        opened = Store(tmp_path, Checkpoint(), tied=TIED)
        opened.save(2, own(PAIR, rank, fill=True), {"config": {}})
        opened.save(4, own(PAIR, rank, fill=True), {"config": {}})

    with pytest.raises(Exception, match="our own mistake"):
        run_ranks(2, work, warm=WARM)
    assert _steps(tmp_path) == []


# ---- two jobs --------------------------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time, pathlib
from megalite.checkpoint import lock
with lock.hold(pathlib.Path(sys.argv[1])):
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_job_in_a_run_folder_is_refused_until_the_first_is_gone_however_it_goes(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert first.stdout and first.stdout.readline() == b"in\n"
        with pytest.raises(UserError, match=rf"run.folder = .* is in use by process {first.pid} on .* since 2"), lock.hold(tmp_path):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    with lock.hold(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()}"), lock.hold(tmp_path):
        pass
    with lock.hold(tmp_path):
        pass


def test_a_disk_without_locks_is_told_of_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with caplog.at_level(logging.WARNING, "megalite"), lock.hold(tmp_path):
        pass
    assert "this disk knows no locks" in caplog.text


# ---- killed ----------------------------------------------------------------------------------------------------------------------------


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
