"""What a checkpoint says of itself, and the checksums that show damage: manifest.json, written last and sealed by a checksum of its own.

In: facts (step, config, mesh, versions, state), and for every file and every stored chunk its length and XXH3 checksum.  Out: the same,
read back and checked. `xxh128sum` computes the same sums of files. The layout of the file is described in docs/checkpoints.md.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from megalite.errors import UserError

FILE = "manifest.json"
SEAL = "xxh3_128"
FORMAT = 1
CURE = "remove the folder to fall back on an older one"
SUMS = ("files", "chunks")  # what is there for checking alone

Chunks = dict[str, list[list[Any]]]
"""Tensor -> [file, offset, bytes, checksum] of each of its chunks."""


class Damaged(UserError):
    """A checkpoint is not what was written: a file is missing, cut short, changed or unreadable. An older one may still be whole."""


def checksum(data: bytes | bytearray | memoryview) -> str:
    """XXH3 of 128 bits, as 32 hexadecimal digits. It finds accidents, not forgers."""
    return xxhash.xxh3_128_hexdigest(data)


def write(folder: Path, facts: Mapping[str, Any], *, files: dict[str, dict[str, Any]], chunks: Chunks) -> None:
    """Write and sync folder/manifest.json."""
    body = {"format": FORMAT, **facts, "files": files, "chunks": chunks}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**body, SEAL: seal(body)}.items()]
    with (folder / FILE).open("w") as file:
        file.write("{\n" + ",\n".join(lines) + "\n}\n")
        file.flush()
        os.fsync(file.fileno())


def seal(body: Mapping[str, Any]) -> str:
    """The checksum of everything else in the manifest, however it is spaced and ordered."""
    rest = {key: value for key, value in body.items() if key != SEAL}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read(folder: Path) -> dict[str, Any]:
    """The whole manifest. Raises UserError where there is none, Damaged where it was changed."""
    path = folder / FILE
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it has no {FILE}; name a step-N folder of a run's checkpoints") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint file {path} cannot be read ({_first_line(error)}); {CURE}") from None
    if not isinstance(body, dict) or body.get(SEAL) != seal(body):
        raise Damaged(f"checkpoint file {path} does not match its own checksum: damaged; {CURE}")
    if body.get("format") != FORMAT:
        raise UserError(f"{path} has format {body.get('format')}, this megalite reads {FORMAT}; use the megalite that wrote it")
    shapes = {"step": int, "config": dict, "files": dict, "chunks": dict}
    wrong = [key for key, kind in shapes.items() if not isinstance(body.get(key), kind)]
    if wrong:
        raise UserError(f"{path} has no {wrong[0]}; it was not written by megalite")
    return body


def read_facts(folder: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without the checksums of its parts. Raises UserError where there is none."""
    return {key: value for key, value in read(folder).items() if key not in (*SUMS, SEAL)}


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
