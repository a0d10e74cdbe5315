"""OUTPUT.parts: where the finished pieces of a preparation wait until all are done.

In: what a piece gave, as arrays. Out: files KEY.part, written whole or not at all, named by the hash of the piece and of all that decides
what it gives. The folder stays where it saves work when the command is given again, and goes otherwise.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from megalite.data.inputs import Piece
from megalite.data.manifest import write_atomically
from megalite.data.pool import deal
from megalite.errors import UserError

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError)  # a zip file has a checksum of all it holds
Begin = Callable[[], Callable[[Any], Any]]
WORTH = 60.0  # seconds of work that a refusal leaves in place


def part_path(folder: Path, piece: Piece, recipe_key: str) -> Path:
    return folder / f"{hashlib.blake2b((recipe_key + piece.key).encode(), digest_size=16).hexdigest()}.part"


def write_part(path: Path, part: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **part)
    write_atomically(path, buffer.getvalue())


def read_part(path: Path) -> tuple[dict[str, Any], Callable[[str], np.ndarray]]:
    """The summary of a part, and how to get its arrays. A damaged one is removed and raises UserError."""

    def read(name: str) -> np.ndarray:
        try:
            return arrays[name]
        except DAMAGE:
            raise damaged() from None

    def damaged() -> UserError:
        path.unlink(missing_ok=True)
        return UserError(f"{path} was damaged and is removed; run the same command again, it makes this piece anew")

    try:
        arrays = np.load(path, allow_pickle=False)
    except DAMAGE:
        raise damaged() from None
    return json.loads(read("summary").tobytes()), read


def pack(rows: list[dict[str, Any]]) -> np.ndarray:
    """JSON lines, compressed."""
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    return np.frombuffer(zstandard.ZstdCompressor(level=1).compress(lines), np.uint8)


def unpack(packed: np.ndarray) -> Iterator[dict[str, Any]]:
    lines = zstandard.ZstdDecompressor().decompress(packed.tobytes())
    return map(json.loads, filter(None, lines.split(b"\n")))


def make_parts(
    pieces: Iterable[Piece], begin: Begin, *, key: str, folder: Path, workers: int | None, count: Callable[[dict, int], None]
) -> tuple[list[Path], int]:
    """The part of every piece, in order, and how many of them an earlier run had made.

    `begin` gives workers what they do; `key` names all that decides it but the piece; count(summary, size) is called for every part.
    """
    paths: list[Path] = []
    sizes: dict[int, int] = {}
    kept = 0

    def left() -> Iterator[tuple[int, Piece]]:
        nonlocal kept
        for number, piece in enumerate(pieces):
            path = part_path(folder, piece, key)
            paths.append(path)
            if summary := _kept(path):
                kept += 1
                count(summary, piece.size)
            else:
                sizes[number] = piece.size
                yield number, piece

    for number, summary in deal(left(), begin, workers=workers or len(os.sched_getaffinity(0))):
        count(summary, sizes.pop(number))
    return paths, kept


def _kept(path: Path) -> dict | None:
    """The summary of a part that an earlier run made."""
    try:
        return read_part(path)[0] if path.is_file() else None
    except UserError:
        return None  # damaged


@contextmanager
def work_folder(output: str) -> Iterator[Path]:
    """OUTPUT.parts, for one preparation at a time.

    It goes when all is done, and when the work is refused (UserError) before it was worth a minute. What another run left there
    stays, and so does all when we are stopped or fail, unless there is nothing.
    """
    folder = Path(f"{output}.parts")
    began, missing = time.monotonic(), [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as problem:
        raise UserError(f"--output {output} cannot be written ({problem.strerror}: {problem.filename}); choose another place") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another `megalite prepare` is writing {output}; wait for it or choose another --output") from None
        except OSError:
            pass  # a file system without locks
        older = _holds_work(folder)
        try:
            yield folder
        except BaseException as problem:
            refused = isinstance(problem, UserError) and time.monotonic() - began < WORTH
            if not older and (refused or not _holds_work(folder)):
                shutil.rmtree(folder, ignore_errors=True)
                with suppress(OSError):
                    for parent in missing:  # the innermost first
                        parent.rmdir()
            raise
        shutil.rmtree(folder)
    finally:
        os.close(handle)


def _holds_work(folder: Path) -> bool:
    return any(folder.glob("*.part")) or any(folder.glob("tokenizer-*"))
