"""Checkpoints that belong to the model: logical tensors under global names, written by torch.distributed.checkpoint (DCP).

In: the pieces a rank owns and a few facts (step, config).  Out: `checkpoints/step-N/`, holding `weights/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME` in fp32 with global shapes, and `facts.json`. No layout is stored, so loading on another mesh is reading.

A checkpoint is written under a temporary name, every file synced, and renamed when all ranks are done: a folder called step-N is
whole. `latest` is a link to the newest one. Nothing is unpickled but DCP's index, and of that only DCP's own record types.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from megalite.checkpoint.slices import Slice
from megalite.errors import UserError
from megalite.layout import Cut

PARTIAL = ".partial"
CURE = "remove the folder to fall back on an older one"
KINDS = ("weights", "exp_avg", "exp_avg_sq")
RECORDS = {  # what DCP's index is made of, and nothing else
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch._utils": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
}  # fmt: skip


class Piece(Protocol):
    """What `parallel/zero.py` says of the elements a rank owns."""

    @property
    def cut(self) -> Cut: ...
    @property
    def start(self) -> int: ...
    @property
    def master(self) -> Tensor: ...
    @property
    def moments(self) -> dict[str, Tensor]: ...
    @property
    def first(self) -> bool: ...


class Store:
    """The checkpoints of one run folder. Every rank holds one; every call is made by all ranks together."""

    def __init__(self, folder: Path, *, keep: int, tied: dict[str, str]) -> None:
        """`tied`: name -> the name under which that weight is stored."""
        self.folder, self.keep, self.tied = folder, keep, tied
        group = dist.new_group(backend="gloo")  # of its own: saving never meets a training collective
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        self.rank = dist.get_rank()

    def save(self, step: int, pieces: Sequence[Piece], facts: dict[str, Any]) -> Path:
        """Write step-N whole, point `latest` at it, forget the oldest beyond `keep`."""
        final = self.folder / f"step-{step}"
        partial = final.with_name(final.name + PARTIAL)
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier(self.group)
        state = self._state(piece for piece in pieces if piece.first)
        write_state(state, storage_writer=FileSystemWriter(partial), process_group=self.group)
        if self.rank == 0:
            with (partial / "facts.json").open("w") as file:
                json.dump({"step": step, **facts}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            _sync(partial)
            if final.exists():  # a run that resumed below this step comes by again
                shutil.rmtree(final)
            partial.rename(final)
            _link(self.folder / "latest", final.name)
            _sync(self.folder)
            others = [path for path in whole(self.folder) if path != final]  # of a run that resumed below them, newer ones too
            for old in others[: max(0, len(others) + 1 - self.keep)]:
                shutil.rmtree(old)
        dist.barrier(self.group)
        return final

    def load(self, path: Path, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Read what `pieces` are into them, in place; returns the facts. The engine must renew its weights afterwards (`Zero.restore`).

        Raises UserError when the checkpoint is of another model or cannot be read.
        """
        known = index(path).state_dict_metadata
        state = self._state(pieces)
        for key, value in state.items():
            stored = known.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"checkpoint {path} holds no {key}; it is of another model than this run, start in another run.folder")
            if stored.size != value.shape:
                raise UserError(
                    f"checkpoint {path}: {key} is {tuple(stored.size)} there and {tuple(value.shape)} in this run; "
                    "give the model settings it was made with, or start in another run.folder"
                )
        try:
            read_state(state, storage_reader=Reader(path), process_group=self.group)
        except CheckpointException as error:  # derives from BaseException
            raise UserError(f"checkpoint {path} cannot be read: {_first(error)}; {CURE}") from None
        return read_facts(path)

    def _state(self, pieces: Iterable[Piece]) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for piece in pieces:
            name = self.tied.get(piece.cut.name, piece.cut.name)
            for kind, flat in zip(KINDS, (piece.master, piece.moments["exp_avg"], piece.moments["exp_avg_sq"]), strict=True):
                state[f"{kind}/{name}"] = Slice.of(flat, cut=piece.cut, start=piece.start)
        return state


def whole(folder: Path) -> list[Path]:
    """Every whole checkpoint of a run's checkpoints/, oldest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / "facts.json").is_file()]
    return sorted(found, key=lambda path: int(path.name[5:]))


class _OnlyRecords(pickle.Unpickler):
    """DCP's index is a pickle; a checkpoint may come from anybody. Only DCP's own record types are built."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index holds")


class Reader(FileSystemReader):
    """DCP's reader with an index that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = _OnlyRecords(io.BytesIO(path.read_bytes())).load()
            tensors, places = metadata.state_dict_metadata.values(), metadata.storage_data.values()
            ends = [(str(place.relative_path), int(place.offset + place.length)) for place in places]
        except Exception as error:  # a damaged pickle fails in every way there is
            raise UserError(f"checkpoint {self.path} has no readable index .metadata ({_say(error)}); {CURE}") from None
        if not all(isinstance(entry, TensorStorageMetadata) and isinstance(getattr(entry, "size", None), torch.Size) for entry in tensors):
            raise UserError(f"checkpoint {self.path} holds something that is no tensor; it was not written by megalite")
        self._check_files(ends)
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check_files(self, ends: Iterable[tuple[str, int]]) -> None:
        """Every file the index names is there, in the checkpoint's own folder, and long enough."""
        needed: dict[str, int] = {}
        for name, end in ends:
            needed[name] = max(end, needed.get(name, 0))
        for name, size in needed.items():
            path = Path(self.path) / name
            if Path(name).name != name:
                raise UserError(f"checkpoint {self.path} names {name}, a file outside its folder; it was not written by megalite")
            if not path.is_file():
                raise UserError(f"checkpoint file {path} does not exist; {CURE}")
            if path.stat().st_size < size:
                raise UserError(f"checkpoint file {path} holds {path.stat().st_size} bytes, its index promises {size}: truncated; {CURE}")


def index(path: Path) -> Metadata:
    """Names, shapes and places of everything a checkpoint holds."""
    return Reader(path).read_metadata()


def read_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises UserError where there is none."""
    try:
        facts = json.loads((path / "facts.json").read_text())
    except (OSError, ValueError):
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("step"), int) or not isinstance(facts.get("config"), dict):
        raise UserError(
            f"{path} is no checkpoint: it has no readable facts.json; remove it, or name a step-N folder of a run's checkpoints"
        )
    return facts


def load_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Read whole weights in one process, no ranks needed: name -> tensor of the global shape, filled in place."""
    state = {f"weights/{name}": tensor for name, tensor in weights.items()}
    missing = state.keys() - index(path).state_dict_metadata.keys()
    if missing:
        raise UserError(f"checkpoint {path} holds no {sorted(missing)[0]}; it is of another model")
    try:
        with warnings.catch_warnings():  # that it runs in one process, which is what was asked
            warnings.simplefilter("ignore", UserWarning)
            read_state(state, storage_reader=Reader(path), no_dist=True)
    except CheckpointException as error:
        raise UserError(f"checkpoint {path} cannot be read: {_first(error)}") from None


def _first(error: CheckpointException) -> str:
    """The first rank's reason, in one line."""
    rank, (reason, _) = sorted(error.failures.items())[0]
    return f"rank {rank}: {_say(reason)}"


def _say(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(link: Path, target: str) -> None:
    """Point a symbolic link somewhere else in one step."""
    fresh = link.with_name(link.name + PARTIAL)
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(link)
