"""Checkpoints that belong to the model: logical tensors under global names, written by torch.distributed.checkpoint (DCP).

In: the pieces a rank owns and a few facts (step, config, state).  Out: `checkpoints/step-N/`, holding `weights/NAME`, `exp_avg/NAME` and
`exp_avg_sq/NAME` in fp32 with global shapes, and `manifest.json`. No layout is stored, so loading on another mesh is reading.

A checkpoint is written under a temporary name, every file synced, and renamed when all ranks are done: a folder called step-N is whole,
and its checksums tell whether it still is. `latest` is a link to the one written last. In the background a save costs the training a
copy of what the rank owns, in memory or on a disk of the node; one save is under way at most, and the next waits for it.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as read_state
from torch.distributed.checkpoint.state_dict_saver import save as write_state

from megalite.checkpoint import manifest
from megalite.checkpoint.manifest import CURE, Damaged, read_facts
from megalite.checkpoint.retention import link_latest, prune, remove, whole
from megalite.checkpoint.slices import Slice
from megalite.checkpoint.storage import Reader, Writer, open_stage, sync
from megalite.config import Checkpoint
from megalite.errors import UserError
from megalite.layout import Cut

__all__ = ["Damaged", "Store", "index", "load_weights", "read_facts", "whole"]

PARTIAL = ".partial"
PATIENCE = 120.0  # seconds for a save under way when a run ends by a rule
KINDS = ("weights", "exp_avg", "exp_avg_sq")
LOG = logging.getLogger(__name__)
Answer = TypeVar("Answer")


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
    """The checkpoints of one run folder. Every rank holds one; every call is made by all ranks together. Close it, or use `with`."""

    def __init__(self, folder: Path, settings: Checkpoint, *, tied: dict[str, str]) -> None:
        """`tied`: name -> the name under which that weight is stored."""
        self.folder, self.settings, self.tied = folder, settings, tied
        group = dist.new_group(backend="gloo")  # of its own: saving never meets a training collective
        assert isinstance(group, dist.ProcessGroup)
        self.group, self.rank = group, dist.get_rank()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if settings.background else None
        self.flight: Future[str | None] | None = None
        self.copies: dict[str, Tensor] = {}
        self.stage = self._together(partial(open_stage, settings.stage, folder)) if settings.stage else None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.settle()
        elif issubclass(kind, UserError) and self.flight:
            # the run ends by a rule, all ranks alike, and what is being saved is good; what else may be wrong does not hide the reason
            with suppress(Exception):
                self.flight.result(PATIENCE)
        if self.thread:
            self.thread.shutdown(wait=kind is None)

    def make_room(self, pieces: Sequence[Piece]) -> None:
        """Take the memory that saves copy into, while training goes on: the first of them then stalls it no longer than the others."""
        if self.thread and self.stage is None:
            flats = [flat for piece in pieces if piece.first for flat in self._flats(piece)]
            self.flight = self.thread.submit(self._take, flats)

    def save(self, step: int, pieces: Sequence[Piece], facts: dict[str, Any]) -> None:
        """Begin to write step-N, or write it where nothing runs in the background; first wait for the save before.

        When it is whole, `latest` points to it and what need not be kept is gone. Where the disk is full or fails, what was there stays,
        rank 0 says so, and `settle` tells. Raises what else went wrong with this save or, in the background, with the one before.
        """
        self.settle()
        state = self._state((piece for piece in pieces if piece.first), copy=self.thread is not None and self.stage is None)
        writer = Writer(self.folder / f"step-{step}{PARTIAL}", stage=self.stage)
        jobs = [lambda: self._lay(writer, state), lambda: self._finish(writer, step, facts)]
        failed = self._try(step, writer, jobs.pop(0)) if self.stage or not self.thread else None
        if self.thread and not failed:
            self.flight = self.thread.submit(self._try, step, writer, *jobs)
        else:
            self.flight = Future()
            self.flight.set_result(failed or self._try(step, writer, *jobs))

    def settle(self) -> str | None:
        """Wait until the last save is done; why it failed, or None. The same on every rank."""
        return self.flight.result() if self.flight else None

    def _lay(self, writer: Writer, state: dict[str, Any]) -> None:
        """Write what the ranks own, to the run folder or the stage."""

        def open_partial() -> None:
            remove(Path(writer.path))
            Path(writer.path).mkdir(parents=True)

        self._together(open_partial, rank=0)
        write_state(state, storage_writer=writer, process_group=self.group)

    def _finish(self, writer: Writer, step: int, facts: dict[str, Any]) -> None:
        """Bring it from the stage, if it is there, and make it step-N."""
        final = self.folder / f"step-{step}"
        self._together(writer.bring)
        self._together(lambda: _publish(writer, final, {"step": step, **facts}), rank=0)
        self._together(lambda: prune(self.folder, newest=final, settings=self.settings), rank=0)

    def _try(self, step: int, writer: Writer, *jobs: Callable[[], None]) -> str | None:
        """Do this part of a save; why the disk did not let it, or None."""
        try:
            for job in jobs:
                job()
        except (OSError, CheckpointException) as error:
            reason = _disk_failure(error)
            if reason is None:
                raise
            writer.forget()
            self._together(lambda: shutil.rmtree(writer.path, ignore_errors=True), rank=0)
            if self.rank == 0:
                kept = whole(self.folder)
                stays = f"{kept[-1].name} stays the newest checkpoint" if kept else "there is no checkpoint yet"
                LOG.warning("step-%d could not be saved: %s; training goes on, %s", step, reason, stays)
            return reason
        return None

    def load(self, path: Path, pieces: Sequence[Piece], *, weights_only: bool = False) -> dict[str, Any]:
        """Read what `pieces` are into them, in place; returns the facts. The engine must renew its weights afterwards (`Zero.restore`).

        Moments that were never stored (an imported model), or are not wanted, become 0. Raises UserError on every rank when the
        checkpoint is of another model, Damaged when it is not what was written.
        """
        state, reader = self._state(pieces), Reader(path)
        facts = self._together(lambda: read_facts(path))
        weights_only = weights_only or "imported" in facts
        state = self._together(lambda: _check_model(reader, state, weights_only=weights_only))
        if weights_only:
            for moment in (moment for piece in pieces for moment in piece.moments.values()):
                moment.zero_()
        try:
            read_state(state, storage_reader=reader, process_group=self.group)
        except CheckpointException as error:  # derives from BaseException
            raise _first_user_error(path, error) from None
        return facts

    def _state(self, pieces: Iterable[Piece], *, copy: bool = False) -> dict[str, Any]:
        return {
            key: Slice.of(self._hold(key, flat).copy_(flat) if copy else flat, cut=piece.cut, start=piece.start)
            for piece in pieces
            for key, flat in self._flats(piece)
        }

    def _flats(self, piece: Piece) -> Iterable[tuple[str, Tensor]]:
        """What of a piece is stored, under its name."""
        name = self.tied.get(piece.cut.name, piece.cut.name)
        flats = (piece.master, piece.moments["exp_avg"], piece.moments["exp_avg_sq"])
        return [(f"{kind}/{name}", flat) for kind, flat in zip(KINDS, flats, strict=True)]

    def _take(self, flats: Sequence[tuple[str, Tensor]]) -> None:
        for key, flat in flats:
            self._hold(key, flat).zero_()  # a page is taken when it is written to

    def _hold(self, key: str, flat: Tensor) -> Tensor:
        """Memory of the host for a copy of this, kept from save to save."""
        held = self.copies.get(key)
        if held is None or held.shape != flat.shape:
            held = self.copies[key] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return held

    def _together(self, work: Callable[[], Answer], *, rank: int | None = None) -> Answer:
        """What `work` returns, done by every rank or by one (the others get None); where it fails on one, its error on every rank."""
        answer, error = None, None
        if rank in (None, self.rank):
            try:
                answer = work()
            except (UserError, OSError) as caught:
                error = caught
        errors: list[Exception | None] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(errors, error, group=self.group)
        if first := next((error for error in errors if error), None):
            raise first
        return answer  # type: ignore[return-value]


def _check_model(reader: Reader, state: dict[str, Any], *, weights_only: bool) -> dict[str, Any]:
    """What of `state` the checkpoint holds; raises UserError where something is missing or has another shape."""
    path, known = reader.path, reader.read_metadata().state_dict_metadata
    if weights_only:
        state = {key: value for key, value in state.items() if key.startswith("weights/")}
    for key, value in state.items():
        stored = known.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise UserError(f"checkpoint {path} holds no {key}; it is of another model than this run, start in another run.folder")
        if stored.size != value.shape:
            raise UserError(
                f"checkpoint {path}: {key} is {tuple(stored.size)} there and {tuple(value.shape)} in this run; "
                "give the model settings it was made with, or start in another run.folder"
            )
    return state


def index(path: Path) -> Metadata:
    """Names, shapes and places of everything a checkpoint holds."""
    return Reader(path).read_metadata()


def load_weights(source: Path | Reader, weights: dict[str, Tensor]) -> None:
    """Read whole weights in one process, no ranks needed: name -> tensor of the global shape, filled in place."""
    reader = source if isinstance(source, Reader) else Reader(source)
    state = {f"weights/{name}": tensor for name, tensor in weights.items()}
    missing = state.keys() - reader.read_metadata().state_dict_metadata.keys()
    if missing:
        raise UserError(f"checkpoint {reader.path} holds no {sorted(missing)[0]}; it is of another model")
    try:
        with _alone():
            read_state(state, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _first_user_error(Path(reader.path), error) from None


def write_weights(folder: Path, step: int, weights: dict[str, Slice], facts: dict[str, Any]) -> Path:
    """Write step-N of a run's checkpoints/ with weights and no moments, in one process: name -> `Slice.lazily`, in their order."""
    final = folder / f"step-{step}"
    partial = final.with_name(final.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    writer = Writer(partial)
    with _alone():
        write_state({f"weights/{name}": value for name, value in weights.items()}, storage_writer=writer, no_dist=True)
    _publish(writer, final, {"step": step, **facts})
    return final


def _publish(writer: Writer, final: Path, facts: dict[str, Any]) -> None:
    """Seal what was written, and only then give it its name and let `latest` point to it."""
    partial = Path(writer.path)
    manifest.write(partial, facts, files=writer.files, chunks=writer.chunks)
    sync(partial)
    remove(final)  # a run that resumed below this step comes by again
    partial.rename(final)
    sync(final.parent)
    link_latest(final.parent, final.name)


@contextmanager
def _alone() -> Iterator[None]:
    """Without DCP's warning that it runs in one process, which is what was asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _first_user_error(path: Path, error: CheckpointException) -> UserError:
    """What the first rank says, in one line."""
    reason = _reasons(error)[0]
    if isinstance(reason, UserError):
        return reason
    said = " ".join(str(reason).split()) or type(reason).__name__
    return Damaged(f"checkpoint {path} cannot be read: rank {min(error.failures)}: {said}; {CURE}")


def _reasons(error: CheckpointException) -> list[BaseException]:
    return [reason for _, (reason, _) in sorted(error.failures.items())]


def _disk_failure(error: OSError | CheckpointException) -> str | None:
    """The first rank's trouble with the disk; None where something else went wrong, which must not be passed over."""
    if isinstance(error, OSError):
        return str(error)
    if all(isinstance(reason, OSError) for reason in _reasons(error)):
        return f"rank {min(error.failures)}: {_reasons(error)[0]}"
    return None
