"""Files of a checkpoint as torch.distributed.checkpoint (DCP) asks for them, with a checksum of every chunk.

In: DCP's plans.  Out: `__R_0.distcp`, one file a rank, which DCP's own FileSystemReader reads as well, and .metadata, DCP's index. The
`Writer` sums what it writes, chunk by chunk and file by file; the `Reader` believes no byte whose sum it has not compared, and unpickles
nothing but DCP's index, and of that only DCP's own record types.
"""

from __future__ import annotations

import errno
import io
import os
import pickle
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megalite.checkpoint import manifest
from megalite.checkpoint.manifest import CURE, SEAL, Chunks, Damaged, checksum
from megalite.errors import UserError

INDEX = ".metadata"
BLOCK = 16 << 20  # bytes read at once
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


@dataclass(frozen=True)
class Written(WriteResult):
    """DCP's note of one chunk, with its checksum and that of the whole file it lies in."""

    chunk_sum: str = ""
    file_sum: str = ""


class Writer(FileSystemWriter):
    """Writes one file a rank, synced before DCP hears that it is done. On the coordinator, `files` and `chunks` then hold all sums.

    With a stage, a folder on a disk of the node, the file lies there until `bring` has copied it to where it belongs.
    """

    files: dict[str, dict[str, Any]]
    chunks: Chunks

    def __init__(self, path: Path, *, stage: Path | None = None) -> None:
        super().__init__(path)
        self.stage_folder = stage
        self.staged: tuple[Path, str] | None = None  # this rank's file and its checksum

    def bring(self) -> None:
        """Copy this rank's file from the stage, sum what was read, and sync it. Raises OSError, too where the stage lost what it held."""
        if self.staged is None:
            return
        source, total = self.staged
        target, seen = Path(self.path) / source.name, xxhash.xxh3_128()
        with source.open("rb") as read, target.open("wb") as written:
            while part := read.read(BLOCK):
                seen.update(part)
                written.write(part)
            written.flush()
            os.fsync(written.fileno())
        if seen.hexdigest() != total:
            raise OSError(errno.EIO, "the stage gave back other bytes than were written", str(source))
        sync(target.parent)
        self.forget()

    def forget(self) -> None:
        """Take this rank's file off the stage."""
        if self.staged is not None:
            with suppress(OSError):
                self.staged[0].unlink()
        self.staged = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(list(self._write_items(plan, planner)) if plan.items else [])
        return done

    def _write_items(self, plan: SavePlan, planner: SavePlanner) -> Iterable[WriteResult]:
        name = f"{plan.storage_data.prefix}0.distcp"
        path, written, whole, offset = (self.stage_folder or Path(self.path)) / name, [], xxhash.xxh3_128(), 0
        self.staged = (path, "") if self.stage_folder else None
        with path.open("wb") as file:
            for item in plan.items:
                data = _pack(planner.resolve_data(item))
                file.write(data)
                whole.update(data)
                place = _StorageInfo(name, offset, len(data))
                written.append(Written(item.index, len(data), place, chunk_sum=checksum(data)))
                offset += len(data)
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
        self.staged = (path, whole.hexdigest()) if self.stage_folder else None
        return [replace(result, file_sum=whole.hexdigest()) for result in written]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        index = (Path(self.path) / INDEX).read_bytes()
        self.files, self.chunks = {INDEX: {"bytes": len(index), SEAL: checksum(index)}}, {}
        for result in (result for of_rank in results for result in of_rank):
            assert isinstance(result, Written)
            place = result.storage_data
            size = max(place.offset + place.length, self.files.get(place.relative_path, {"bytes": 0})["bytes"])
            self.files[place.relative_path] = {"bytes": size, SEAL: result.file_sum}
            chunk = [place.relative_path, place.offset, place.length, result.chunk_sum]
            self.chunks.setdefault(result.index.fqn, []).append(chunk)


def _pack(tensor: Any) -> memoryview:
    """A tensor as torch.save writes it. Of a view, the clone: torch.save would write all that lies beneath it."""
    assert isinstance(tensor, Tensor)
    buffer = io.BytesIO()
    torch.save(tensor.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
    return buffer.getbuffer()


class Reader(FileSystemReader):
    """DCP's reader with an index that cannot run code and chunks that are what was written. The index is read once."""

    known: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self.known is not None:
            return self.known
        folder = Path(self.path)
        body = manifest.read(folder)
        check_files(folder, body)
        metadata = _unpickle(folder, body["files"].get(INDEX, {}).get(SEAL))
        self.sums = {(file, offset): (length, total) for chunks in body["chunks"].values() for file, offset, length, total in chunks}
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        self.known = metadata
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every chunk that is asked for once, in the order of the file."""
        needed: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            needed.setdefault(item.storage_index, []).append(item)
        with ExitStack() as stack:
            opened: dict[str, IO[bytes]] = {}
            for index in sorted(needed, key=lambda index: (self.storage_data[index].relative_path, self.storage_data[index].offset)):
                tensor = self._read_chunk(index, opened, stack)
                for item in needed[index]:
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_chunk(self, index: MetadataIndex, opened: dict[str, IO[bytes]], stack: ExitStack) -> Tensor:
        place = self.storage_data[index]
        path = Path(self.path) / place.relative_path
        where = f"checkpoint file {path}, bytes {place.offset} to {place.offset + place.length} ({index.fqn})"
        try:
            if place.relative_path not in opened:
                opened[place.relative_path] = stack.enter_context(path.open("rb"))
            opened[place.relative_path].seek(place.offset)
            data = opened[place.relative_path].read(place.length)
        except OSError as error:
            raise Damaged(f"{where} cannot be read ({error.strerror}); {CURE}") from None
        if (len(data), checksum(data)) != self.sums.get((place.relative_path, place.offset)):
            raise Damaged(f"{where} does not match its checksum: damaged; {CURE}")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def check_files(folder: Path, body: dict[str, Any]) -> None:
    """Every file that the manifest names is there, in the checkpoint's own folder, and of the right length."""
    for name, known in body["files"].items():
        path = folder / name
        if not _is_beside(name):
            raise UserError(f"checkpoint {folder} names {name}, a file outside its folder; it was not written by megalite")
        try:
            size = path.stat().st_size
        except OSError:
            raise Damaged(f"checkpoint file {path} does not exist; {CURE}") from None
        if size != known["bytes"]:
            wrong = "truncated" if size < known["bytes"] else "something was added"
            raise Damaged(f"checkpoint file {path} holds {size} bytes, its manifest promises {known['bytes']}: {wrong}; {CURE}")


def _is_beside(name: str) -> bool:
    """Whether this is the plain name of a file in the same folder."""
    return Path(name).name == name and name not in ("", "..")


class _OnlyRecords(pickle.Unpickler):
    """DCP's index is a pickle; a checkpoint may come from anybody. Only DCP's own record types are built."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name in RECORDS.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint index holds")


def _unpickle(folder: Path, total: str | None) -> Metadata:
    """DCP's index, if it is what the manifest promises and holds tensors in files of this folder alone."""
    path = folder / INDEX
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Damaged(f"checkpoint {folder} has no readable index {INDEX} ({error.strerror}); {CURE}") from None
    if checksum(data) != total:
        raise Damaged(f"checkpoint file {path} does not match its checksum: damaged; {CURE}")
    try:
        metadata = _OnlyRecords(io.BytesIO(data)).load()
        tensors, names = metadata.state_dict_metadata.values(), {str(place.relative_path) for place in metadata.storage_data.values()}
    except Exception as error:  # a wrong pickle fails in every way there is
        raise UserError(f"checkpoint {folder} has no readable index {INDEX} ({' '.join(str(error).split())}); {CURE}") from None
    if not all(isinstance(entry, TensorStorageMetadata) and isinstance(getattr(entry, "size", None), torch.Size) for entry in tensors):
        raise UserError(f"checkpoint {folder} holds something that is no tensor; it was not written by megalite")
    stranger = next((name for name in names if not _is_beside(name)), None)
    if stranger is not None:
        raise UserError(f"checkpoint {folder} names {stranger}, a file outside its folder; it was not written by megalite")
    return metadata


def open_stage(where: str, run: Path) -> Path:
    """The folder of one run on a node's own disk, without what a killed job left there. Raises UserError where it cannot be made."""
    folder = Path(where) / f"megalite-{xxhash.xxh3_64_hexdigest(str(run.resolve()).encode())}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.distcp"):
            left.unlink(missing_ok=True)  # the ranks of a node all try
    except OSError as error:
        raise UserError(f"checkpoint.stage = {where} cannot be used ({error.strerror}); name a folder on a disk of every node") from None
    return folder


def sync(folder: Path) -> None:
    """Make a folder's entries durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
