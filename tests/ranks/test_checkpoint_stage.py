"""`checkpoint.stage`: a save lies on a disk of each node before it is copied to the run folder, and nothing less is asked of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from toy import LAYOUTS, TIED, WARM, own, read

from megalite.checkpoint import storage
from megalite.checkpoint.store import Store, whole
from megalite.config import Checkpoint
from megalite.errors import UserError
from megalite.launch import run_ranks

PAIR = LAYOUTS[1]


def test_with_a_stage_a_step_waits_for_the_disk_of_its_node_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is what was there when the save began, though nothing of it was copied in memory."""
    real, runs, stage, trained_on = storage.Writer.bring, tmp_path / "runs", tmp_path / "stage", threading.Event()

    def slow(self: Any) -> None:
        assert trained_on.wait(60), "the step waits for the run folder"
        real(self)

    monkeypatch.setattr(storage.Writer, "bring", slow)

    def work(rank: int) -> None:
        with Store(runs, Checkpoint(stage=str(stage)), tied=TIED) as opened:
            held = own(PAIR, rank, fill=True)
            opened.save(2, held, {"config": {"name": "toy"}})
            assert len(list(stage.rglob(f"__{rank}_*.distcp"))) == 1 and not opened.copies  # the other rank may be elsewhere
            for piece in held:
                piece.master.fill_(7)
            trained_on.set()

    storage.open_stage(str(stage), runs)
    lost = next(stage.iterdir()) / "__0_0.distcp"
    lost.write_bytes(b"left by a job that was killed")
    run_ranks(2, work, warm=WARM)
    assert not list(stage.rglob("*.distcp"))
    read(runs / "step-2", LAYOUTS[2])


def test_a_stage_that_gives_back_other_bytes_is_found_out(tmp_path: Path) -> None:
    runs, stage = tmp_path / "runs", tmp_path / "stage"

    def work(rank: int) -> str | None:
        bring = storage.Writer.bring

        def flip(self: Any) -> None:
            if rank == 1 and self.staged:
                path = self.staged[0]
                data = bytearray(path.read_bytes())
                data[len(data) // 2] ^= 1
                path.write_bytes(data)
            bring(self)

        storage.Writer.bring = flip  # type: ignore[method-assign]  in this forked rank alone
        with Store(runs, Checkpoint(stage=str(stage)), tied=TIED) as opened:
            opened.save(2, own(PAIR, rank, fill=True), {"config": {"name": "toy"}})
            return opened.settle()

    said = run_ranks(2, work, warm=WARM)
    assert all(line and "the stage gave back other bytes" in line for line in said)
    assert not whole(runs)


def test_a_stage_that_cannot_be_made_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"checkpoint.stage = .*file/here cannot be used \(Not a directory\); name a folder"):
        run_ranks(2, lambda rank: Store(tmp_path / "runs", Checkpoint(stage=str(tmp_path / "file/here")), tied=TIED), warm=WARM)
    with pytest.raises(ValueError, match=r"copied in the background, and checkpoint.background = false"):
        Checkpoint(stage=str(tmp_path), background=False)
