"""A disk that is full or fails, a second job, a kill at any moment: it is said, training goes on where it can, what was whole stays so."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from toy import LAYOUTS, TIED, WARM, own, read, write

from megalite.checkpoint import lock, retention, storage, store
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


@pytest.mark.parametrize("how", ["waiting", "background", "staged"])
@pytest.mark.parametrize(
    ("culprit", "moment", "trouble"),
    [(1, "file", errno.ENOSPC), (0, "file", errno.EIO), (0, "manifest", errno.ENOSPC), (0, "folder", errno.EIO), (1, "stage", errno.EIO)],
)
def test_a_full_or_failing_disk_costs_one_checkpoint_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, culprit: int, moment: str, trouble: int
) -> None:
    if moment == "stage" and how != "staged":
        pytest.skip("there is no stage")
    real, runs, stage = os.fsync, tmp_path / "runs", tmp_path / "stage"
    settings = Checkpoint(background=how != "waiting", stage=str(stage) if how == "staged" else None)

    def work(rank: int) -> tuple[list[str | None], list[str]]:
        said: list[str] = []
        store.LOG.addHandler(handler := logging.Handler())
        handler.emit = lambda record: said.append(record.getMessage())

        def fail(handle: int) -> None:
            path = Path(f"/proc/self/fd/{handle}").resolve()
            place = "file" if path.suffix == ".distcp" else {"manifest.json": "manifest", "step-4.partial": "folder"}.get(path.name)
            if place == "file" and path.is_relative_to(stage):
                place = "stage"
            if step == 4 and rank == culprit and place == moment:
                raise OSError(trouble, os.strerror(trouble), path.name)
            real(handle)

        monkeypatch.setattr(os, "fsync", fail)
        outcomes = []
        with Store(runs, settings, tied=TIED) as opened:
            for step in (2, 4, 6):
                opened.save(step, own(PAIR, rank, fill=True), {"config": {"name": "toy"}})
                outcomes.append(opened.settle())
                if step == 4:
                    assert not (runs / "step-4.partial").exists(), "what is half-written takes room"
        return outcomes, said

    outcomes = run_ranks(2, work, warm=WARM)
    for (first, failed, last), _ in outcomes:
        assert first is None and last is None
        assert failed is not None and os.strerror(trouble) in failed
    assert any("step-4 could not be saved" in line and "step-2 stays the newest" in line for line in outcomes[0][1])
    assert not outcomes[1][1], "one rank speaks for all"
    assert _steps(runs) == [2, 6]
    assert read(runs / "latest", LAYOUTS[2])["step"] == 6
    assert not list(stage.rglob("*.distcp"))


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
    real, under_way, most, written, go = storage.Writer.write_data, 0, 0, 0, threading.Event()

    def slow(self: Any, *arguments: Any) -> Any:
        nonlocal under_way, most, written
        under_way += 1
        most = max(most, under_way)
        go.wait(60)
        under_way -= 1
        assert threading.current_thread() is not threading.main_thread()
        done = real(self, *arguments)
        written += 1
        return done

    monkeypatch.setattr(storage.Writer, "write_data", slow)

    def work(rank: int) -> tuple[list[int], int]:
        held, known = own(PAIR, rank, fill=True), []
        with Store(tmp_path, Checkpoint(), tied=TIED) as opened:
            for step in (2, 4):
                for piece, fresh in zip(held, own(PAIR, rank, fill=True), strict=True):
                    piece.master.copy_(fresh.master)
                    for kind, moment in piece.moments.items():
                        moment.copy_(fresh.moments[kind])
                opened.save(step, held, {"config": {"name": "toy"}})
                known.append(written)
                threading.Timer(0.3, go.set).start()
                for piece in held:
                    piece.master.fill_(7)
                    for moment in piece.moments.values():
                        moment.fill_(7)
        return known, most

    (first, second), most = run_ranks(2, work, warm=WARM)[0]
    assert first == 0 < second, "the first save holds nobody up, the second waits for it"
    assert most == 1
    for step in (2, 4):
        read(tmp_path / f"step-{step}", LAYOUTS[2])


def test_memory_for_the_copies_is_taken_before_the_first_save(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with Store(tmp_path, Checkpoint(), tied=TIED) as opened:
            held = own(PAIR, rank, fill=True)
            opened.make_room(held)
            opened.settle()
            places = {key: copy.data_ptr() for key, copy in opened.copies.items()}
            opened.save(2, held, {"config": {"name": "toy"}})
            assert places and places == {key: copy.data_ptr() for key, copy in opened.copies.items()}

    run_ranks(2, work, warm=WARM)
    read(tmp_path / "step-2", LAYOUTS[2])


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
