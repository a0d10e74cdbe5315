"""Cleans all pieces of a preparation: deals them to workers, finds what repeats, says what became of the text.

In: pieces, how to read them, a `Cleaning`.  Out: the same pieces cleaned, and a `Record` for the data card; with a report, a line for every
document that was changed or removed, which names place and reason and repeats nothing of the text.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megalite.data import clean
from megalite.data.clean import REPORTED, Cleaning, Tally
from megalite.data.documents import refuse
from megalite.data.duplicates import EXACT, KEPT, OPEN, Finder
from megalite.data.inputs import Piece, Reading
from megalite.data.manifest import SPLITS
from megalite.data.parts import make_parts, read_part, unpack
from megalite.data.progress import Bar
from megalite.errors import UserError

EXAMPLES = 3  # places shown for each thing that was found


@dataclass
class Record:
    """What cleaning did: a tally of every step in order ("read" is what came in), broken lines, and where examples are."""

    steps: dict[str, Tally] = field(default_factory=dict)
    bad: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)
    reported: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {name: tally.summary() for name, tally in self.steps.items()}


def sweep(
    pieces: Iterable[Piece], reading: Reading, cleaning: Cleaning, *, folder: Path, workers: int | None, skip: bool, bar: Bar
) -> tuple[list[Piece], Record, Iterator[dict[str, Any]]]:
    """Cleaned pieces, the record, and the events of a report. `skip`: broken lines are left out, not refused."""
    key = hashlib.blake2b(json.dumps([cleaning.fingerprint, reading.text_key, reading.documents]).encode(), digest_size=16).hexdigest()
    record = Record()
    seen: list[Piece] = []

    def remember() -> Iterator[Piece]:
        for piece in pieces:
            seen.append(Piece("cleaned", piece.paths, piece.key, size=piece.size))  # without the lines it may carry
            yield piece

    def count(summary: dict, size: int) -> None:
        if summary["bad"] and not skip:
            raise refuse(summary["reported"], summary["bad"])
        record.bad += summary["bad"]
        record.reported += summary["reported"]
        for name, tally in summary["steps"].items():
            record.steps.setdefault(name, Tally()).add(tally)
        bar.advance(size)

    begin = functools.partial(clean.begin, reading, cleaning, key, folder)
    paths, _ = make_parts(remember(), begin, key=key, folder=folder, workers=workers, count=count)
    parts = [_Part(path, read_part(path)[0]["whole"]) for path in paths]
    repeats = _Repeats(parts, cleaning, record)
    cleaned = [
        Piece("cleaned", (str(part.path),), _identity(key, piece.identity, bits), data=bits, size=piece.size)
        for part, piece, bits in zip(parts, seen, map(repeats.bits, range(len(parts))), strict=True)
    ]
    _gather_examples(record, parts, repeats)
    if not any(tally.documents for tally in list(record.steps.values())[-1:]):
        removed = "; ".join(f"{name} {dict(tally.found)}" for name, tally in record.steps.items() if tally.found)
        raise UserError(f"cleaning left no document ({removed or 'there was none'}); loosen these steps")
    return cleaned, record, repeats.events()


@dataclass(frozen=True)
class _Part:
    path: Path
    whole: int  # documents that are whole, and so have a sketch

    def rows(self) -> Iterator[dict[str, Any]]:
        return unpack(read_part(self.path)[1]("rows"))

    def events(self) -> Iterator[dict[str, Any]]:
        return unpack(read_part(self.path)[1]("events"))


class _Repeats:
    """What repeats, by part and row."""

    def __init__(self, parts: list[_Part], cleaning: Cleaning, record: Record) -> None:
        self.parts, self.on = parts, cleaning.duplicates is not None
        self.finder = None
        self.wheres = functools.lru_cache(OPEN)(lambda part: [row["where"] for row in parts[part].rows() if row["first"] and row["last"]])
        if cleaning.duplicates is not None:
            self.finder = Finder([part.path for part in parts], [part.whole for part in parts], cleaning.duplicates)
            self.first, self.how = self.finder.find()
            record.steps["duplicates"] = self._tally(list(record.steps.values())[-1])

    def _tally(self, before: Tally) -> Tally:
        characters = 0
        for part in range(len(self.parts)):
            gone = self._gone(part)
            if gone.any():
                wholes = (row for row in self.parts[part].rows() if row["first"] and row["last"])
                characters += sum(len(row["text"]) for row, out in zip(wholes, gone, strict=True) if out)
        exact, near = int((self.how == EXACT).sum()), int((self.how > EXACT).sum())
        found = {name: number for name, number in (("exact", exact), ("near", near)) if number}
        tally = Tally(before.documents - exact - near, before.characters - characters, exact + near)
        tally.found.update(found)
        return tally

    def _gone(self, part: int) -> np.ndarray:
        """Of the whole documents of a part: which repeat an earlier one."""
        assert self.finder is not None
        return self.how[self.finder.starts[part] : self.finder.starts[part + 1]] != KEPT

    def bits(self, part: int) -> bytes:
        """A bit for every row of a part, set where it stays."""
        whole = np.array([row["first"] and row["last"] for row in self.parts[part].rows()], bool)
        kept = np.ones(len(whole), bool)
        if self.finder is not None:
            kept[whole] = ~self._gone(part)
        return np.packbits(kept).tobytes()

    def events(self) -> Iterator[dict[str, Any]]:
        """Everything that happened to a document, in order; duplicates last."""
        for part in self.parts:
            yield from part.events()
        if self.finder is None:
            return
        for number in np.flatnonzero(self.how != KEPT):
            name = "exact" if self.how[number] == EXACT else "near"
            place, of = (self._where(int(each)) for each in (number, self.first[number]))
            yield {"where": place, "step": "duplicates", "removed": True, "found": {name: 1}, "of": of}

    def _where(self, number: int) -> str:
        assert self.finder is not None
        part, place = self.finder.locate(number)
        return self.wheres(part)[place]


def _identity(key: str, piece: str, bits: bytes) -> str:
    return hashlib.blake2b(f"{key} {piece}".encode() + bits, digest_size=16).hexdigest()


def _gather_examples(record: Record, parts: list[_Part], repeats: _Repeats) -> None:
    """A few places for each thing found, as the data card and the console show them."""
    wanted = {(name, what) for name, tally in record.steps.items() for what in tally.found}
    for event in repeats.events():
        for what in event["found"]:
            places = record.examples.setdefault(f"{event['step']}: {what}", [])
            if len(places) < EXAMPLES:
                places.append(event["where"] + (f" repeats {event['of']}" if "of" in event else ""))
            if len(places) == EXAMPLES:
                wanted.discard((event["step"], what))
        if not wanted:
            return


def say(record: Record, console: Console) -> None:
    """The record as lines."""
    before: Tally | None = None
    for name, tally in record.steps.items():
        if before is not None:
            gone, changed = before.documents - tally.documents, tally.changed
            what = ", ".join(f"{what} {number:,}" for what, number in tally.found.most_common(6))
            console.print(
                f"  {name}: {gone:,} of {before.documents:,} documents out, {changed - gone:,} changed"
                + (f" ({what})" if what else ""), markup=False,
            )  # fmt: skip
            for key, places in record.examples.items():
                if key.startswith(f"{name}: "):
                    console.print(f"    {key.partition(': ')[2]}: {'; '.join(places[:1])}", markup=False)
        before = tally
    for line in sorted(record.reported)[:REPORTED]:
        console.print(f"  skipped {line}", highlight=False, markup=False)


def files_of(output: str) -> dict[str, Path]:
    """Where card and report lie, beside OUTPUT's shards."""
    assert not output.endswith(tuple(f".{split}" for split in SPLITS)), output
    return {"card": Path(f"{output}.card.json"), "page": Path(f"{output}.card.md"), "report": Path(f"{output}.removed.jsonl")}
