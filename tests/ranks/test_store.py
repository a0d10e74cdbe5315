"""A checkpoint belongs to the model: written on any layout it reads on any other, bit for bit; and it is whole or it is not there.

Real ranks, small tensors, no DeepSpeed (see toy.py).
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import LAYOUTS, LOGICAL, TIED, WARM, WEIGHTS, Layout, full, own, read, write

from megalite.checkpoint import storage, store
from megalite.checkpoint.store import Store
from megalite.config import Checkpoint
from megalite.crew import RankError
from megalite.launch import run_ranks


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """The same model, saved on every layout."""
    folder = tmp_path_factory.mktemp("written")
    for layout in LAYOUTS:
        write(folder / str(layout), layout, 4)
    return {layout: folder / str(layout) / "step-4" for layout in LAYOUTS}


# ---- the same numbers on every layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", LAYOUTS, ids=str)
def test_what_any_layout_wrote_reads_on_this_one_bit_for_bit(written: dict[Layout, Path], there: Layout) -> None:
    def work(rank: int) -> None:
        for here, path in written.items():
            held = own(there, rank, fill=False)
            facts = Store(path.parent, Checkpoint(), tied=TIED).load(path, held)
            assert facts == {"format": 1, "step": 4, "config": {"name": "toy"}}
            for found, wanted in zip(held, own(there, rank, fill=True), strict=True):
                assert torch.equal(found.master, wanted.master), f"{here} -> {there}: {found.cut}"
                for kind, moment in wanted.moments.items():
                    assert torch.equal(found.moments[kind], moment), f"{here} -> {there}: {kind} of {found.cut}"

    run_ranks(there.world, work, warm=WARM)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_process_reads_whole_weights_from_any_layout(written: dict[Layout, Path], layout: Layout) -> None:
    weights = {name: torch.full(WEIGHTS[name][0], torch.nan) for name in LOGICAL}
    store.load_weights(written[layout], weights)
    assert all(torch.equal(weights[name], full(name, "weights")) for name in LOGICAL)


def test_the_code_of_the_format_page_reads_a_checkpoint_with_dcp_alone(written: dict[Layout, Path]) -> None:
    page = Path(__file__).parents[2] / "docs/checkpoints.md"
    code = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)[0]
    assert "megalite" not in code.replace("megalite reads it", "")
    code = code.replace("runs/gpt-tiny/checkpoints/latest", str(written[LAYOUTS[3]])).replace("attention.qkv", "qkv")
    known: dict[str, Any] = {}
    exec(code, known)
    assert known["state"].keys() == {f"{kind}/{name}" for kind in store.KINDS for name in LOGICAL}
    for key, tensor in known["state"].items():
        kind, name = key.split("/")
        assert torch.equal(tensor, full(name, kind)), key


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_index_names_logical_tensors_of_global_shape_and_no_layout(written: dict[Layout, Path], layout: Layout) -> None:
    entries = store.index(written[layout]).state_dict_metadata
    assert {key: tuple(entry.size) for key, entry in entries.items()} == {
        f"{kind}/{name}": WEIGHTS[name][0] for kind in store.KINDS for name in LOGICAL
    }


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_element_is_written_once(written: dict[Layout, Path], layout: Layout) -> None:
    for key, entry in store.index(written[layout]).state_dict_metadata.items():
        seen = torch.zeros(entry.size)
        for chunk in entry.chunks:
            view = seen
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                view = view.narrow(dim, offset, size)
            view += 1
        assert (seen == 1).all(), key


# ---- whole or not there ----------------------------------------------------------------------------------------------------------------


def test_latest_points_to_the_newest_and_the_oldest_go(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS[1], 2, 4, 10, keep=2)
    assert store.whole(tmp_path) == [tmp_path / "step-4", tmp_path / "step-10"]
    assert (tmp_path / "latest").readlink() == Path("step-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-4"]
    assert read(tmp_path / "latest", LAYOUTS[2])["step"] == 10


def test_fewer_checkpoints_than_may_be_kept_all_stay(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS[0], 1, 2, 3, 4, keep=5)
    assert [path.name for path in store.whole(tmp_path)] == ["step-1", "step-2", "step-3", "step-4"]


def test_a_run_that_resumed_below_newer_checkpoints_keeps_what_it_writes(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS[0], 8, 10, keep=2)
    write(tmp_path, LAYOUTS[0], 9, keep=2)
    assert [path.name for path in store.whole(tmp_path)] == ["step-9", "step-10"]
    assert (tmp_path / "latest").readlink() == Path("step-9")
    write(tmp_path, LAYOUTS[0], 7, keep=1)
    assert [path.name for path in store.whole(tmp_path)] == ["step-7"]
    assert (tmp_path / "latest").readlink() == Path("step-7")


def test_the_same_step_saved_twice_is_the_second_one(tmp_path: Path) -> None:
    write(tmp_path, LAYOUTS[2], 4, salt=1)
    write(tmp_path, LAYOUTS[1], 4)
    read(tmp_path / "step-4", LAYOUTS[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-4"]


def _die_while(rank: int, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Save step 2 whole, then be killed in the middle of step 4."""
    opened = Store(folder, Checkpoint(keep=9, background=False), tied=TIED)
    opened.save(2, own(LAYOUTS[1], rank, fill=True), {"config": {}})

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing" and rank == 1:
        monkeypatch.setattr(storage.Writer, "write_data", die)
    if moment == "manifest" and rank == 0:
        monkeypatch.setattr(store.manifest, "write", die)
    if moment == "renaming" and rank == 0:
        monkeypatch.setattr(store.Path, "rename", die)
    if moment == "linking" and rank == 0:
        monkeypatch.setattr(store, "link_latest", die)
    opened.save(4, own(LAYOUTS[1], rank, fill=True), {"config": {}})


@pytest.mark.parametrize("moment", ["writing", "manifest", "renaming"])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before_as_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(2, lambda rank: _die_while(rank, tmp_path, monkeypatch, moment), warm=WARM)
    assert store.whole(tmp_path) == [tmp_path / "step-2"]
    assert (tmp_path / "latest").readlink() == Path("step-2")
    assert (tmp_path / "step-4.partial").is_dir(), "the test killed too early"
    write(tmp_path, LAYOUTS[0], 4)  # and what lies there does not stand in the way
    assert read(tmp_path / "step-4", LAYOUTS[2])["step"] == 4
    assert not (tmp_path / "step-4.partial").exists()


def test_killed_after_the_renaming_the_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(2, lambda rank: _die_while(rank, tmp_path, monkeypatch, "linking"), warm=WARM)
    assert [path.name for path in store.whole(tmp_path)] == ["step-2", "step-4"]
    assert read(tmp_path / "step-4", LAYOUTS[0])["step"] == 4


def test_pieces_that_leave_a_hole_are_no_checkpoint(tmp_path: Path) -> None:
    """Our own mistake, found before the folder takes its name."""

    def work(rank: int) -> None:
        held = own(LAYOUTS[1], rank, fill=True)
        Store(tmp_path, Checkpoint(keep=9, background=False), tied=TIED).save(4, held[rank:], {"config": {}})  # rank 1 forgets its first

    with pytest.raises(RankError, match="validate global plan"):
        run_ranks(2, work, warm=WARM)
    assert store.whole(tmp_path) == []
