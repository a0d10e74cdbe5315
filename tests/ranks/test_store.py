"""A checkpoint belongs to the model: written on any layout it reads on any other, bit for bit; and it is whole or it is not there.

Real ranks, small tensors, no DeepSpeed: a rank's pieces are cut here as ZeRO cuts them.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import pickle
import signal
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata

from megalite.checkpoint import store
from megalite.checkpoint.store import Store
from megalite.crew import RankError
from megalite.errors import UserError
from megalite.launch import run_ranks
from megalite.layout import Cut
from megalite.mesh import Mesh

WARM = ("megalite.checkpoint.store",)
WEIGHTS: dict[str, tuple[tuple[int, ...], int | None, tuple[int, ...]]] = {  # name -> shape, dim of the tensor-parallel cut, sections
    "embed.weight": ((11, 4), 0, ()),  # a vocabulary that does not divide
    "layers.0.qkv.weight": ((12, 5), 0, (6, 3, 3)),  # fused, grouped heads
    "layers.0.qkv.bias": ((12,), 0, (6, 3, 3)),
    "layers.0.out.weight": ((5, 9), 1, ()),  # a row cut
    "layers.0.norm.weight": ((5,), None, ()),
    "layers.1.scale": ((), None, ()),
    "layers.1.cube": ((3, 4, 5), 1, (2, 2)),
    "layers.1.one": ((1, 1), None, ()),
    "head.weight": ((11, 4), 0, ()),  # tied to embed.weight
}
TIED = {"head.weight": "embed.weight"}
LOGICAL = [name for name in WEIGHTS if name not in TIED]


@dataclasses.dataclass
class Piece:
    cut: Cut
    start: int
    master: Tensor
    moments: dict[str, Tensor]
    first: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """`zero`: replicated (ZeRO 0), flat (1, 2: the whole of a stage's weights in one buffer), sharded (3: every weight by itself)."""

    dp: int
    pp: int
    tp: int
    zero: str

    @property
    def world(self) -> int:
        return self.dp * self.pp * self.tp

    def __str__(self) -> str:
        return f"dp{self.dp} pp{self.pp} tp{self.tp} {self.zero}"


LAYOUTS = [
    Layout(1, 1, 1, "flat"),
    Layout(2, 1, 1, "sharded"),
    Layout(1, 1, 2, "sharded"),
    Layout(2, 1, 2, "flat"),
    Layout(1, 2, 3, "flat"),
    Layout(3, 2, 1, "sharded"),
    Layout(2, 2, 1, "replicated"),
]


def _full(name: str, kind: str, salt: int = 0) -> Tensor:
    """The logical tensor: random, decided by its name."""
    draw = torch.Generator().manual_seed(zlib.crc32(f"{TIED.get(name, name)} {kind} {salt}".encode()))
    return torch.randn(WEIGHTS[name][0], generator=draw)


def _ranges(sizes: list[int], mesh: Mesh, zero: str) -> list[range]:
    """Which flat range of every local shard this dp rank owns."""
    if zero == "replicated":
        return [range(size) for size in sizes]
    if zero == "sharded":
        length = [-(-size // mesh.dp) for size in sizes]
        return [range(min(mesh.dp_rank * n, size), min((mesh.dp_rank + 1) * n, size)) for n, size in zip(length, sizes, strict=True)]
    begins = list(itertools.accumulate(sizes, initial=0))
    part = -(-begins[-1] // mesh.dp)
    low, high = mesh.dp_rank * part, (mesh.dp_rank + 1) * part
    return [range(min(max(low - at, 0), size), max(min(high - at, size), 0)) for at, size in zip(begins, sizes, strict=False)]


def _pieces(layout: Layout, rank: int, *, fill: bool, salt: int = 0, weights: dict | None = None) -> list[Piece]:
    """What a rank owns, filled with the logical values or with NaN to be read into."""
    mesh = Mesh(dp=layout.dp, pp=layout.pp, tp=layout.tp, rank=rank)
    names = [name for number, name in enumerate(weights or WEIGHTS) if number * mesh.pp // len(weights or WEIGHTS) == mesh.pp_rank]
    if mesh.pp == 1:
        names = [name for name in names if name not in TIED]  # one stage holds one weight, not two copies
    cuts = []
    for name in names:
        shape, dim, parts = (weights or WEIGHTS)[name]
        cuts.append(Cut(name, shape, dim, parts, index=mesh.tp_rank, num=mesh.tp))
    pieces = []
    sizes = [torch.Size(cut.local_shape).numel() for cut in cuts]
    for cut, place in zip(cuts, _ranges(sizes, mesh, layout.zero), strict=True):
        if not len(place):
            continue
        flat = {kind: torch.full((len(place),), torch.nan) for kind in store.KINDS}
        if fill:
            flat = {kind: cut.take(_full(cut.name, kind, salt)).flatten()[place.start : place.stop].clone() for kind in store.KINDS}
        tied = cut.name in TIED or cut.name in TIED.values()
        copy = (cut.dim is None and mesh.tp_rank) or (tied and not mesh.first_stage) or (layout.zero == "replicated" and mesh.dp_rank)
        pieces.append(Piece(cut, place.start, flat.pop("weights"), flat, not copy))
    return pieces


def _write(folder: Path, layout: Layout, *steps: int, keep: int = 9, salt: int = 0) -> None:
    def work(rank: int) -> None:
        opened = Store(folder, keep=keep, tied=TIED)
        pieces = _pieces(layout, rank, fill=True, salt=salt)
        for piece in pieces:
            if not piece.first:
                piece.master.fill_(torch.nan)  # of several copies only the first may be stored
        for step in steps:
            opened.save(step, pieces, {"config": {"name": "toy"}})

    run_ranks(layout.world, work, warm=WARM)


def _read(path: Path, layout: Layout, *, weights: dict | None = None) -> dict[str, Any]:
    """Load on every rank and compare every element with the logical values; returns the facts."""

    def work(rank: int) -> dict[str, Any]:
        pieces = _pieces(layout, rank, fill=False, weights=weights)
        facts = Store(path.parent, keep=9, tied=TIED).load(path, pieces)
        for found, wanted in zip(pieces, _pieces(layout, rank, fill=True), strict=True):
            assert torch.equal(found.master, wanted.master), found.cut
            assert all(torch.equal(found.moments[kind], wanted.moments[kind]) for kind in wanted.moments), found.cut
        return facts

    return run_ranks(layout.world, work, warm=WARM)[0]


def _refusal(path: Path, layout: Layout = LAYOUTS[1], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        _read(path, layout, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """The same model, saved on every layout."""
    folder = tmp_path_factory.mktemp("written")
    for layout in LAYOUTS:
        _write(folder / str(layout), layout, 4)
    return {layout: folder / str(layout) / "step-4" for layout in LAYOUTS}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One to be damaged, of two ranks."""
    _write(tmp_path / "run", LAYOUTS[1], 4)
    return tmp_path / "run/step-4"


# ---- the same numbers on every layout --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", LAYOUTS, ids=str)
def test_what_any_layout_wrote_reads_on_this_one_bit_for_bit(written: dict[Layout, Path], there: Layout) -> None:
    def work(rank: int) -> None:
        for here, path in written.items():
            pieces = _pieces(there, rank, fill=False)
            facts = Store(path.parent, keep=9, tied=TIED).load(path, pieces)
            assert facts == {"step": 4, "config": {"name": "toy"}}
            for found, wanted in zip(pieces, _pieces(there, rank, fill=True), strict=True):
                assert torch.equal(found.master, wanted.master), f"{here} -> {there}: {found.cut}"
                for kind, moment in wanted.moments.items():
                    assert torch.equal(found.moments[kind], moment), f"{here} -> {there}: {kind} of {found.cut}"

    run_ranks(there.world, work, warm=WARM)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_process_reads_whole_weights_from_any_layout(written: dict[Layout, Path], layout: Layout) -> None:
    weights = {name: torch.full(WEIGHTS[name][0], torch.nan) for name in LOGICAL}
    store.load_weights(written[layout], weights)
    assert all(torch.equal(weights[name], _full(name, "weights")) for name in LOGICAL)


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
    _write(tmp_path, LAYOUTS[1], 2, 4, 10, keep=2)
    assert store.whole(tmp_path) == [tmp_path / "step-4", tmp_path / "step-10"]
    assert (tmp_path / "latest").readlink() == Path("step-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-10", "step-4"]
    assert _read(tmp_path / "latest", LAYOUTS[2])["step"] == 10


def test_fewer_checkpoints_than_may_be_kept_all_stay(tmp_path: Path) -> None:
    _write(tmp_path, LAYOUTS[0], 1, 2, 3, 4, keep=5)
    assert [path.name for path in store.whole(tmp_path)] == ["step-1", "step-2", "step-3", "step-4"]


def test_a_run_that_resumed_below_newer_checkpoints_keeps_what_it_writes(tmp_path: Path) -> None:
    _write(tmp_path, LAYOUTS[0], 8, 10, keep=2)
    _write(tmp_path, LAYOUTS[0], 9, keep=2)
    assert [path.name for path in store.whole(tmp_path)] == ["step-9", "step-10"]
    assert (tmp_path / "latest").readlink() == Path("step-9")
    _write(tmp_path, LAYOUTS[0], 7, keep=1)
    assert [path.name for path in store.whole(tmp_path)] == ["step-7"]
    assert (tmp_path / "latest").readlink() == Path("step-7")


def test_the_same_step_saved_twice_is_the_second_one(tmp_path: Path) -> None:
    _write(tmp_path, LAYOUTS[2], 4, salt=1)
    _write(tmp_path, LAYOUTS[1], 4)
    _read(tmp_path / "step-4", LAYOUTS[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-4"]


def _die_while(rank: int, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Save step 2 whole, then be killed in the middle of step 4."""
    opened = Store(folder, keep=9, tied=TIED)
    opened.save(2, _pieces(LAYOUTS[1], rank, fill=True), {"config": {}})

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "writing" and rank == 1:
        monkeypatch.setattr(store.FileSystemWriter, "write_data", die)
    if moment == "facts" and rank == 0:
        monkeypatch.setattr(store.json, "dump", die)
    if moment == "renaming" and rank == 0:
        monkeypatch.setattr(store.Path, "rename", die)
    if moment == "linking" and rank == 0:
        monkeypatch.setattr(store, "_link", die)
    opened.save(4, _pieces(LAYOUTS[1], rank, fill=True), {"config": {}})


@pytest.mark.parametrize("moment", ["writing", "facts", "renaming"])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before_as_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(2, lambda rank: _die_while(rank, tmp_path, monkeypatch, moment), warm=WARM)
    assert store.whole(tmp_path) == [tmp_path / "step-2"]
    assert (tmp_path / "latest").readlink() == Path("step-2")
    assert (tmp_path / "step-4.partial").is_dir(), "the test killed too early"
    _write(tmp_path, LAYOUTS[0], 4)  # and what lies there does not stand in the way
    assert _read(tmp_path / "step-4", LAYOUTS[2])["step"] == 4
    assert not (tmp_path / "step-4.partial").exists()


def test_killed_after_the_renaming_the_checkpoint_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_ranks(2, lambda rank: _die_while(rank, tmp_path, monkeypatch, "linking"), warm=WARM)
    assert [path.name for path in store.whole(tmp_path)] == ["step-2", "step-4"]
    assert _read(tmp_path / "step-4", LAYOUTS[0])["step"] == 4


def test_pieces_that_leave_a_hole_are_no_checkpoint(tmp_path: Path) -> None:
    """Our own mistake, found before the folder takes its name."""

    def work(rank: int) -> None:
        pieces = _pieces(LAYOUTS[1], rank, fill=True)
        Store(tmp_path, keep=9, tied=TIED).save(4, pieces[rank:], {"config": {}})  # rank 1 forgets its first

    with pytest.raises(RankError, match="validate global plan"):
        run_ranks(2, work, warm=WARM)
    assert store.whole(tmp_path) == []


# ---- another model ---------------------------------------------------------------------------------------------------------------------


def test_another_models_shape_is_refused_with_both_shapes(checkpoint: Path) -> None:
    other = {**WEIGHTS, "embed.weight": ((12, 4), 0, ())}
    said = _refusal(checkpoint, weights=other)
    assert "weights/embed.weight is (11, 4) there and (12, 4) in this run" in said and str(checkpoint) in said


def test_a_tensor_that_is_missing_is_refused_by_name(checkpoint: Path) -> None:
    other = {**WEIGHTS, "layers.1.other.weight": ((5,), None, ())}
    assert f"checkpoint {checkpoint} holds no weights/layers.1.other.weight; it is of another model" in _refusal(checkpoint, weights=other)
    with pytest.raises(UserError, match=r"holds no weights/layers\.1\.other\.weight"):
        store.load_weights(checkpoint, {"layers.1.other.weight": torch.zeros(5)})


# ---- damage ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_line_that_names_it(checkpoint: Path, share: float) -> None:
    path = checkpoint / "__1_0.distcp"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    said = f"checkpoint file {path} holds {int(len(whole) * share)} bytes, its index promises {len(whole)}: truncated; remove the folder"
    assert said in _refusal(checkpoint)
    with pytest.raises(UserError, match="truncated"):
        store.load_weights(checkpoint, {name: torch.zeros(WEIGHTS[name][0]) for name in LOGICAL})


def test_a_missing_file_is_refused_in_one_line_that_names_it(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    assert f"checkpoint file {checkpoint / '__0_0.distcp'} does not exist; remove the folder to fall back" in _refusal(checkpoint)


def test_a_file_of_rubbish_is_refused_in_one_line(checkpoint: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    assert f"checkpoint {checkpoint} cannot be read: rank" in _refusal(checkpoint)


def test_a_missing_index_is_refused_in_one_line_that_names_it(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()
    assert f"checkpoint {checkpoint} has no readable index .metadata" in _refusal(checkpoint)


def test_an_index_damaged_anywhere_is_never_a_traceback(checkpoint: Path) -> None:
    """Cut off at every length, and a byte changed in a thousand places: read, or refused in one line."""
    path = checkpoint / ".metadata"
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    for at, value in torch.randint(0, 2**31, (1000, 2), generator=draw).tolist():
        changed = bytearray(whole)
        changed[at % len(whole)] = value % 256
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            store.index(checkpoint)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(damaged) // 2


@pytest.mark.parametrize("index", [[1, 2], {}, None, Metadata({}, storage_data=None), Metadata({"a": 1}, storage_data={})])
def test_an_index_that_is_something_else_is_refused(checkpoint: Path, index: Any) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    assert str(checkpoint) in _refusal(checkpoint)


# ---- from anybody ----------------------------------------------------------------------------------------------------------------------


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (torch.load, ("{}",), "torch.serialization.load"),
        (getattr, ("{}", "upper"), "builtins.getattr"),
    ],
)
def test_an_index_that_would_run_code_is_refused_and_does_not_run(
    checkpoint: Path, tmp_path: Path, function: Any, arguments: tuple, named: str
) -> None:
    trace = tmp_path / "ran"
    filled = [value.format(trace) if isinstance(value, str) else value for value in arguments]
    good = pickle.loads((checkpoint / ".metadata").read_bytes())
    good.planner_data = _Calls(function, *filled)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(good))
    assert named in _refusal(checkpoint)
    with pytest.raises(UserError, match=named):
        store.index(checkpoint)
    assert not trace.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes()) if function is os.system else None
    assert trace.exists() == (function is os.system), "the index of this test would not have run anything"


def test_a_data_file_that_would_run_code_is_refused_and_does_not_run(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "__1_0.distcp"
    torch.save(_Calls(os.system, f"touch {tmp_path}/ran"), tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    good = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in good.storage_data.values():
        if place.relative_path == path.name:
            place.offset, place.length = 0, len(evil)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(good))
    path.write_bytes(evil)
    assert "cannot be read" in _refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../step-2/__0_0.distcp", "/etc/hostname", "..", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(checkpoint: Path, name: str) -> None:
    good = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in good.storage_data.values():
        place.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(good))
    assert "it was not written by megalite" in _refusal(checkpoint) or not name.strip("."), name
