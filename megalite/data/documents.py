"""Reads the documents of a piece.

In: a `Piece` and how text lies in it. Out: `Document`s in order, and in their place `BadLine`s that name file and line. Two pieces that
meet in the middle of a line or a text agree on who reads it, by looking at nothing but the bytes around the place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from megalite.data.inputs import SMALLEST, Piece, Reading
from megalite.data.parts import read_part, unpack
from megalite.errors import UserError

HEAD = 1 << 16  # a document's first bytes name it
# Where a text file may be cut, the best first. No tokenizer here joins a letter with a line end or a space behind it, so cutting a long
# document there changes no token.
BREAKS = {
    "line": (re.compile(rb"\n"),),
    "blank-line": (re.compile(rb"\n[ \t\r]*\n"),),
    "file": (re.compile(rb"[A-Za-z0-9](?=\n)"), re.compile(rb"[A-Za-z0-9](?= )")),
}


@dataclass(frozen=True)
class Document:
    """A text, or a part of one too long to hold."""

    text: str
    head: bytes
    """The beginning of the whole document."""
    first: bool = True
    """It begins here."""
    last: bool = True
    """It ends here."""
    where: str = ""
    """File and place in it."""


@dataclass(frozen=True)
class BadLine:
    """A line (or a file) that holds no text, and why."""

    where: str
    why: str


def refuse(reported: list[str], count: int) -> UserError:
    """What to say of broken lines, where they are not to be skipped."""
    more = f" (and {count - 1} more broken lines there)" if count > 1 else ""
    return UserError(f"{reported[0]}{more}; mend it, or leave such lines out with --bad-lines skip")


def documents(piece: Piece, reading: Reading) -> Iterator[Document | BadLine]:
    """The texts of a piece in order."""
    if piece.kind == "texts":
        for path in piece.paths:
            yield _document(Path(path).read_bytes(), path)
    elif piece.kind == "rows":
        yield from _rows(piece, reading.text_key)
    elif piece.kind == "lines":
        yield from _lines(piece, reading.text_key)
    elif piece.kind == "cleaned":
        yield from _cleaned(piece)
    else:
        yield from _parts(piece, reading.documents)


def _document(data: bytes, path: str, *, offset: int = 0) -> Document | BadLine:
    """The text that begins at this byte of a file."""
    try:
        text = data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line = line_number(path, offset + problem.start)
        return BadLine(f"{path}:{line}", f"no UTF-8 (byte 0x{data[problem.start]:02x})")
    return Document(text, data[:HEAD], where=f"{path} byte {offset}" if offset else path)


def _cleaned(piece: Piece) -> Iterator[Document]:
    """What `clean.py` left of a piece; data has a bit for every document, set where it stays."""
    rows = unpack(read_part(Path(piece.paths[0]))[1]("rows"))
    assert piece.data is not None
    for byte, eight in zip(piece.data, batched(rows), strict=True):
        for place, row in enumerate(eight):
            if byte >> (7 - place) & 1:
                head = bytes.fromhex(row["head"]) or row["text"].encode("utf-8", "surrogatepass")[:HEAD]
                yield Document(row["text"], head, row["first"], row["last"], row["where"])


def batched(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Eight at a time, as the bits of a byte."""
    while eight := list(islice(rows, 8)):
        yield eight


def _rows(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(piece.paths[0]) as parquet:
            for batch in parquet.iter_batches(batch_size=256, row_groups=[piece.group], columns=[text_key]):
                for at in range(max(row, piece.start), min(row + len(batch), piece.stop)):
                    text = batch.column(0)[at - row].as_py()
                    where = f"{piece.paths[0]} row {at} of group {piece.group}"
                    yield BadLine(where, f'"{text_key}" is null') if text is None else Document(text, text.encode()[:HEAD], where=where)
                row += len(batch)
                if row >= piece.stop:
                    return
    except UnicodeDecodeError as problem:
        raise UserError(
            f"{piece.paths[0]} row group {piece.group} holds text that is no UTF-8 ({problem.reason}); write it again"
        ) from None
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"{piece.paths[0]} is damaged in row group {piece.group} ({problem}); copy it again") from None


def _lines(piece: Piece, text_key: str) -> Iterator[Document | BadLine]:
    """A piece owns the lines that begin in it."""
    if piece.data is not None:
        place = piece.paths[1]
        for at, line in enumerate(piece.data.split(b"\n"), piece.first_line):
            if line.strip():
                yield _json(line, text_key, f"{place}{at}")
        return
    path = piece.paths[0]
    with Path(path).open("rb") as file:
        at = piece.start
        if at:
            file.seek(at - 1)
            at += len(file.readline()) - 1  # the end of the line before
        while at < piece.stop and (line := file.readline()):
            if line.strip():
                found = _json(line, text_key, f"{path} byte {at}")
                yield BadLine(f"{path}:{line_number(path, at)}", found.why) if isinstance(found, BadLine) else found
            at += len(line)


def line_number(path: str, offset: int) -> int:
    """The line that holds this byte, counted from 1."""
    count, left = 1, offset
    with Path(path).open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _json(line: bytes, text_key: str, where: str) -> Document | BadLine:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        return BadLine(where, f"no UTF-8 (byte 0x{line[problem.start]:02x})")
    except json.JSONDecodeError as problem:
        return BadLine(where, f"no JSON ({problem.msg.removesuffix(' at')} at character {problem.pos + 1})")
    except ValueError as problem:  # a number of more digits than Python converts
        return BadLine(where, f"no JSON ({problem})")
    except RecursionError:
        return BadLine(where, "JSON nested too deep")
    if not isinstance(row, dict) or text_key not in row:
        return BadLine(
            where,
            f'no "{text_key}" (it has {", ".join(map(str, row)) or "nothing"}; --text-key)' if isinstance(row, dict) else "no JSON object",
        )
    if not isinstance(row[text_key], str):
        return BadLine(where, f'"{text_key}" is {type(row[text_key]).__name__}, no text')
    try:
        return Document(row[text_key], row[text_key].encode()[:HEAD], where=where)
    except UnicodeEncodeError:
        return BadLine(where, f'"{text_key}" holds half a surrogate pair')


def _parts(piece: Piece, separator: str) -> Iterator[Document | BadLine]:
    """A byte range of a text file, from the first break after its start to the first after its stop."""
    path = Path(piece.paths[0])
    size = path.stat().st_size
    with path.open("rb") as file:
        start, stop = (_break_after(file, at, size, BREAKS[separator]) for at in (piece.start, piece.stop))
        head = file.read(HEAD) if not file.seek(0) else b""
        file.seek(start)
        data = file.read(stop - start)
    if not data:
        return
    if separator == "file":
        found = _document(data, str(path), offset=start)
        if isinstance(found, BadLine):
            yield found
            found = Document("", head)  # what came before still needs its end
        yield replace(found, head=head, first=start == 0, last=stop == size)
        return
    at = 0
    for found in chain(BREAKS[separator][0].finditer(data), [None]):
        end = found.end() if found else len(data)
        if data[at:end].strip():
            yield _document(data[at:end].strip(b"\r\n"), str(path), offset=start + at)
        at = end


def _break_after(file: BinaryIO, at: int, size: int, patterns: tuple[re.Pattern[bytes], ...]) -> int:
    """Where the first break after `at` lies; both neighbours of a cut find the same. Without one nearby, a letter's beginning."""
    if at in (0, size):
        return at
    file.seek(at - 1)
    window = file.read(SMALLEST)
    if found := next(filter(None, (pattern.search(window) for pattern in patterns)), None):
        return at - 1 + found.end()
    return min(size, at + next(i for i, byte in enumerate(window[1:5] + b"\0") if byte & 0xC0 != 0x80))
