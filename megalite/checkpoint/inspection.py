"""`megalite checkpoint ls|verify|show`: what checkpoints there are, whether they are whole to the last bit, what one holds.

In: a run folder, its checkpoints/, or one checkpoint.  Out: lines on the console; `verify` reads every byte and exits with 1 where one is
not what was written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from megalite.checkpoint import manifest
from megalite.checkpoint.manifest import SEAL, checksum, read_facts
from megalite.checkpoint.retention import loss_of, whole
from megalite.config import Section
from megalite.errors import UserError

Say = Callable[[str], None]


class Inspection(Section):
    what: tuple[str, ...] = ()
    """ls, verify or show, and the folders: runs/NAME, its checkpoints/, or a checkpoint."""


@dataclass(frozen=True)
class Fault:
    """A part of a checkpoint that is not what was written; `tensor` is None for what belongs to no tensor."""

    file: str
    tensor: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor or 'the file'} {self.reason}"


@dataclass
class Findings:
    """What reading every byte of a checkpoint found."""

    num_bytes: int = 0
    num_tensors: int = 0
    damage: list[Fault] = field(default_factory=list)


def inspect(path: Path) -> Findings:
    """Read every file of a checkpoint and compare every checksum. Raises UserError where there is no readable manifest."""
    body = manifest.read(path)
    found = Findings(num_tensors=len(body["chunks"]))
    places: dict[str, list[tuple[int, int, str, str]]] = {name: [] for name in body["files"]}
    for tensor, chunks in body["chunks"].items():
        for file, offset, length, total in chunks:
            places.setdefault(file, []).append((offset, length, total, tensor))
    for name, known in body["files"].items():
        found.damage += _inspect_file(path / name, known, sorted(places[name]))
        found.num_bytes += known["bytes"]
    return found


def _inspect_file(path: Path, known: dict[str, Any], chunks: list[tuple[int, int, str, str]]) -> Iterator[Fault]:
    try:
        size = path.stat().st_size
        if size != known["bytes"]:
            yield Fault(path.name, None, f"holds {size} bytes instead of {known['bytes']}")
        if not chunks and checksum(path.read_bytes()) != known[SEAL]:
            yield Fault(path.name, None, "does not match its checksum")
        with path.open("rb") as file:
            for offset, length, total, tensor in chunks:  # they cover the file without a gap
                file.seek(offset)
                if checksum(file.read(length)) != total:
                    yield Fault(path.name, tensor, f"does not match its checksum (bytes {offset} to {offset + length})")
    except OSError as error:
        yield Fault(path.name, None, f"cannot be read ({error.strerror})")


def run(request: Inspection, *, say: Say) -> int:
    """Carry out a verb on folders; the exit code."""
    verbs = {"ls": _list, "verify": _verify, "show": _show}
    verb, *folders = request.what or ("",)
    if verb not in verbs or not folders:
        raise UserError("megalite checkpoint needs ls, verify or show and a folder: megalite checkpoint verify runs/NAME")
    return max([verbs[verb](folder, say) for folder in map(Path, folders)])


def find(folder: Path) -> list[Path]:
    """The checkpoints of a run folder or of its checkpoints/, or the one that the folder is. Raises UserError where there is none."""
    if (folder / manifest.FILE).is_file():
        return [folder]
    found = whole(folder / "checkpoints") or whole(folder)
    if not found:
        raise UserError(f"{folder} holds no checkpoint; name a run folder, its checkpoints/, or a step-N folder")
    return found


def _list(folder: Path, say: Say) -> Literal[0]:
    for path in find(folder):
        try:
            body = manifest.read(path)
        except UserError as error:
            say(f"{path}  {error}")
            continue
        size = sum(known["bytes"] for known in body["files"].values())
        written = datetime.fromtimestamp((path / manifest.FILE).stat().st_mtime).isoformat(" ", "minutes")
        loss = loss_of(path)
        valid = f"validation loss {loss:.4f}" if math.isfinite(loss) else ""
        newest = "  <- latest" if (path.parent / "latest").resolve() == path.resolve() else ""
        say(f"{path}  step {body['step']:>8,}  {size / 1e6:>10,.1f} MB  {written}  {valid}{newest}".rstrip())
    return 0


def _verify(folder: Path, say: Say) -> Literal[0, 1]:
    code: Literal[0, 1] = 0
    for path in find(folder):
        try:
            found = inspect(path)
            faults = [str(fault) for fault in found.damage]
            sound = f"whole: {found.num_tensors} tensors, {found.num_bytes / 1e6:,.1f} MB"
        except UserError as error:
            faults, sound = [str(error)], ""
        say(f"{path}  {sound}" if not faults else f"{path}  DAMAGED")
        for fault in faults:
            say(f"  {fault}")
        code = 1 if faults else code
    return code


def _show(folder: Path, say: Say) -> Literal[0]:
    from megalite.checkpoint.store import index  # torch takes a second to import, and `ls` needs none

    for path in find(folder)[-1:]:
        facts = read_facts(path)
        say(f"{path}")
        for name, value in facts.items():
            if name != "config":
                say(f"  {name:<12} {value}")
        for section, value in facts["config"].items():
            say(f"  {f'config.{section}':<12} {value}")
        entries = index(path).state_dict_metadata
        for name in sorted(entries):
            say(f"  {name:<50} {tuple(entries[name].size)}")  # type: ignore[union-attr]
    return 0
