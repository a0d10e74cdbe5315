"""Damage never passes for a checkpoint, and a checkpoint from anybody runs no code; every refusal is one line that names the file."""

from __future__ import annotations

import errno
import io
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata
from toy import LAYOUTS, LOGICAL, TIED, WARM, WEIGHTS, Layout, own, read, reseal, write

from megalite.checkpoint import manifest, store
from megalite.checkpoint.inspection import inspect
from megalite.checkpoint.store import Damaged, Store
from megalite.config import Checkpoint
from megalite.errors import UserError
from megalite.launch import run_ranks


def _refusal(path: Path, layout: Layout = LAYOUTS[1], **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(path, layout, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One to be damaged, of two ranks."""
    write(tmp_path / "run", LAYOUTS[1], 4)
    return tmp_path / "run/step-4"


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
    said = f"checkpoint file {path} holds {int(len(whole) * share)} bytes, its manifest promises {len(whole)}: truncated; remove the folder"
    assert said in _refusal(checkpoint)
    with pytest.raises(UserError, match="truncated"):
        store.load_weights(checkpoint, {name: torch.zeros(WEIGHTS[name][0]) for name in LOGICAL})


def test_a_missing_file_is_refused_in_one_line_that_names_it(checkpoint: Path) -> None:
    (checkpoint / "__0_0.distcp").unlink()
    assert f"checkpoint file {checkpoint / '__0_0.distcp'} does not exist; remove the folder to fall back" in _refusal(checkpoint)


def test_a_file_that_grew_is_refused(checkpoint: Path) -> None:
    with (checkpoint / "__1_0.distcp").open("ab") as file:
        file.write(b"\0")
    assert "something was added" in _refusal(checkpoint)


def _flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_one_flipped_bit_anywhere_is_refused_with_file_and_tensor(checkpoint: Path) -> None:
    """DCP alone and DeepSpeed load such a file without a word."""
    body = manifest.read(checkpoint)
    draw = random.Random(0)
    weights = {name: torch.zeros(WEIGHTS[name][0]) for name in LOGICAL}
    for key, chunks in body["chunks"].items():
        file, offset, length, _ = draw.choice(chunks)
        bit = 8 * offset + draw.randrange(8 * length)
        _flip(checkpoint / file, bit)
        assert [key] == [found.tensor for found in inspect(checkpoint).damage]
        if key.startswith("weights/"):
            with pytest.raises(Damaged, match=rf"{file}, bytes {offset} to {offset + length} \({key}\) does not match its checksum"):
                store.load_weights(checkpoint, weights)
        _flip(checkpoint / file, bit)
    store.load_weights(checkpoint, weights)
    assert not inspect(checkpoint).damage


def test_all_ranks_hear_of_a_bit_that_one_of_them_met(checkpoint: Path) -> None:
    file, offset, length, _ = manifest.read(checkpoint)["chunks"]["exp_avg/layers.0.qkv.bias"][1]
    _flip(checkpoint / file, 8 * (offset + length) - 1)

    def work(rank: int) -> str:
        with pytest.raises(Damaged) as caught:
            Store(checkpoint.parent, Checkpoint(), tied=TIED).load(checkpoint, own(LAYOUTS[5], rank, fill=False))
        return str(caught.value)

    said = run_ranks(LAYOUTS[5].world, work, warm=WARM)
    assert len(set(said)) == 1 and file in said[0] and "(exp_avg/layers.0.qkv.bias)" in said[0]


def test_a_bit_flipped_anywhere_in_manifest_or_index_is_refused(checkpoint: Path) -> None:
    for path in (checkpoint / "manifest.json", checkpoint / ".metadata"):
        size = 8 * path.stat().st_size
        for bit in random.Random(1).sample(range(size), 200):
            _flip(path, bit)
            refused = False
            try:
                store.index(checkpoint)
            except Damaged as error:
                refused = str(path) in str(error) and "\n" not in str(error)
            _flip(path, bit)
            # white space between the entries is the one thing that means nothing
            assert refused or chr(path.read_bytes()[bit // 8]).isspace(), (path, bit)


def test_a_chunk_that_cannot_be_read_is_refused_with_file_and_tensor(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": Broken() if self.suffix == ".distcp" else plain(self, mode))
    with pytest.raises(Damaged, match=r"__0_0.distcp, bytes .* \(weights/.*\) cannot be read \(Input/output error\)"):
        store.load_weights(checkpoint, {name: torch.zeros(WEIGHTS[name][0]) for name in LOGICAL})


@pytest.mark.parametrize("name", [".metadata", "manifest.json"])
def test_a_missing_index_is_refused_in_one_line_that_names_it(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    assert name in _refusal(checkpoint)


@pytest.mark.slow
def test_an_index_wrong_anywhere_is_never_a_traceback_though_its_checksum_fits(checkpoint: Path) -> None:
    """Cut off at many lengths, and a byte changed in three hundred places: read, or refused in one line."""
    path = checkpoint / ".metadata"
    whole = path.read_bytes()
    draw = torch.Generator().manual_seed(0)
    damaged = [whole[:size] for size in range(0, len(whole), 31)]
    for at, value in torch.randint(0, 2**31, (300, 2), generator=draw).tolist():
        changed = bytearray(whole)
        changed[at % len(whole)] = value % 256
        damaged.append(bytes(changed))
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        reseal(checkpoint)
        try:
            store.index(checkpoint)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(damaged) // 2


@pytest.mark.parametrize("index", [[1, 2], {}, None, Metadata({}, storage_data=None), Metadata({"a": 1}, storage_data={})])
def test_an_index_that_is_something_else_is_refused(checkpoint: Path, index: Any) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    reseal(checkpoint)
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
    reseal(checkpoint)
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
    body = manifest.read(checkpoint)
    total = manifest.checksum(evil)
    files = {**body["files"], path.name: {"bytes": len(evil), manifest.SEAL: total}}
    chunks = {
        key: [[path.name, 0, len(evil), total] if at[0] == path.name else at for at in where] for key, where in body["chunks"].items()
    }
    reseal(checkpoint, files=files, chunks=chunks)
    assert "cannot be read: rank" in _refusal(checkpoint)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../step-2/__0_0.distcp", "/etc/hostname", "..", ""])
def test_an_index_that_names_a_file_elsewhere_is_refused(checkpoint: Path, name: str) -> None:
    good = pickle.loads((checkpoint / ".metadata").read_bytes())
    for place in good.storage_data.values():
        place.relative_path = name
    (checkpoint / ".metadata").write_bytes(pickle.dumps(good))
    reseal(checkpoint)
    assert f"names {name}, a file outside its folder; it was not written by megalite" in _refusal(checkpoint)


@pytest.mark.parametrize("name", ["../step-2/__0_0.distcp", "/etc/hostname", "..", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(checkpoint: Path, name: str) -> None:
    files = {**manifest.read(checkpoint)["files"], name: {"bytes": 1, manifest.SEAL: ""}}
    reseal(checkpoint, files=files)
    assert f"names {name}, a file outside its folder; it was not written by megalite" in _refusal(checkpoint)
