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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.inputs import Piece
from megalite.data.manifest import write_atomically
from megalite.errors import UserError

DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError)  # a zip file has a checksum of all it holds
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
