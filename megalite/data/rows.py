"""Rows of a table for fine-tuning: some columns of .tsv, .csv, .jsonl and .parquet files, or of Hugging Face data sets.

In: files and column names.  Out: `Row`s, each with its place, and what was wrong with those that could not be read. A .tsv has no
quotes, a .csv has (RFC 4180); both begin with a line of column names. Files are UTF-8.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.data.inputs import hugging_face_rows
from megalite.errors import UserError

ENDINGS = (".tsv", ".csv", ".jsonl", ".parquet")
SHOWN = 5  # bad rows that are named


@dataclass(frozen=True)
class Row:
    """The columns that were asked for, in that order, and where they stood."""

    values: tuple[Any, ...]
    where: str


@dataclass
class Faults:
    """Bad rows: how many for each reason, and where the first ones are."""

    refuse: bool
    counts: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Count a row, or raise UserError where rows are to be whole."""
        if self.refuse:
            raise UserError(f"{where}: {why}; mend it, or leave such rows out with --bad-rows skip")
        self.counts[why] = self.counts.get(why, 0) + 1
        if len(self.places) < SHOWN:
            self.places.append(f"{where}: {why}")


def read_rows(inputs: Sequence[str], columns: Sequence[str], faults: Faults) -> Iterator[Row]:
    """Every row of every input in order. Raises UserError for a file that is missing or has no such columns."""
    for name in inputs:
        if name.startswith("hf:"):
            yield from _picked(((row, f"{name} row {n}") for n, row in enumerate(hugging_face_rows(name))), columns, name, faults)
            continue
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name} does not exist; give rows as {' '.join(ENDINGS)} or hf:NAME[:CONFIG][:SPLIT]")
        if path.suffix not in ENDINGS:
            raise UserError(f"{name} is of no known kind ({' '.join(ENDINGS)}); rename or convert it")
        read = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix, _table)
        yield from _picked(read(path, faults), columns, name, faults)


def _picked(found: Iterator[tuple[dict[str, Any], str]], columns: Sequence[str], name: str, faults: Faults) -> Iterator[Row]:
    """The columns of every row; one that is missing in the first row is missing in the file."""
    known: set[str] | None = None
    for row, where in found:
        known = set(row) if known is None else known
        if missing := [column for column in columns if column not in known]:
            raise UserError(
                f"{name} has no column {', '.join(missing)} (it has {', '.join(map(str, row))}); name the right ones with --columns, in "
                "the task's order"
            )
        if any(row.get(column) is None for column in columns):
            faults.add(where, f"no {next(column for column in columns if row.get(column) is None)}")
            continue
        yield Row(tuple(row[column] for column in columns), where)


def _table(path: Path, faults: Faults) -> Iterator[tuple[dict[str, Any], str]]:
    text = _decode(path)
    if path.suffix == ".tsv":
        rows: Iterator[list[str]] = (line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip("\r"))
    else:
        rows = (row for row in csv.reader(text.splitlines(keepends=True)) if row)
    try:
        header = next(rows, None)
        if header is None:
            raise UserError(f"{path} is empty; its first line must name the columns")
        for number, row in enumerate(rows, 2):
            if len(row) != len(header):
                faults.add(f"{path} row {number}", f"{len(row)} columns instead of {len(header)}")
                continue
            yield dict(zip(header, row, strict=True)), f"{path} row {number}"
    except csv.Error as problem:
        raise UserError(f"{path} is no CSV ({problem}); write it again, or as .jsonl") from None


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        cure = f"convert it, for instance: iconv -f GB18030 -t UTF-8 {path}"
        raise UserError(f"{path}:{line} is no UTF-8 (byte 0x{data[problem.start]:02x}): mixed or other encoding; {cure}") from None


def _json_lines(path: Path, faults: Faults) -> Iterator[tuple[dict[str, Any], str]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as problem:
            faults.add(where, f"no UTF-8 (byte 0x{line[problem.start]:02x})")
        except (ValueError, RecursionError):
            faults.add(where, "no JSON")
        else:
            if isinstance(row, dict):
                yield row, where
            else:
                faults.add(where, "no JSON object")


def _parquet(path: Path, faults: Faults) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield row, f"{path} row {number}"
                    number += 1
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"{path} is no parquet file, or damaged ({problem}); copy it again") from None
