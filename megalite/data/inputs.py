"""Finds text and cuts it into pieces, and reads the documents of a piece.

In: what the user named (files, folders, hf:NAME, stdlib). Out: `Piece`s of a few MB in a fixed order, whose cuts depend on the
input alone, never on who reads them; `documents(piece)` then yields texts and the lines that are broken. What can be read from the
middle (text, jsonl, parquet) is cut by position and read by whoever works on it; what cannot (gzip, zstd, Hugging Face streams) is
cut while it streams by, and its pieces carry their lines.
"""

from __future__ import annotations

import hashlib
import json
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from megalite.errors import UserError

GROUP = 32 << 20  # bytes of a parquet piece: reading the middle of a row group means decoding its beginning
SMALLEST, LARGEST = 1 << 20, 16 << 20  # a piece in bytes
HEAD = 1 << 16  # a document's first bytes name it
TEXT = (".txt", ".text", ".md", ".rst", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FOLDER = (".txt", *LINES, ".parquet")  # what a folder contributes: not the README beside the data
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# Where a text file may be cut, the best first. No tokenizer here joins a letter with a line end or a space behind it, so cutting a long
# document there changes no token.
BREAKS = {
    "line": (re.compile(rb"\n"),),
    "blank-line": (re.compile(rb"\n[ \t\r]*\n"),),
    "file": (re.compile(rb"[A-Za-z0-9](?=\n)"), re.compile(rb"[A-Za-z0-9](?= )")),
}


@dataclass(frozen=True)
class Piece:
    """Some MB of input."""

    kind: str
    """texts: whole files; part: bytes of a text file; lines: bytes of a jsonl file; rows: of a parquet row group."""
    paths: tuple[str, ...]
    identity: str
    """Stands for the content: sizes and times of the files, or a hash of `data`."""
    start: int = 0
    stop: int = 0
    group: int = 0
    data: bytes | None = field(default=None, repr=False)
    """The lines themselves, where the input can only be streamed."""
    first_line: int = 1
    size: int = 0
    """Bytes on disk it stands for, to show progress."""

    @property
    def key(self) -> str:
        parts = [self.kind, *self.paths, self.identity, self.start, self.stop, self.group, self.first_line]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


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


@dataclass(frozen=True)
class BadLine:
    """A line (or a file) that holds no text, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Reading:
    """How text lies in the files."""

    text_key: str = "text"
    documents: str = "file"
    """What a text file holds: one document (file), one a line (line), or some between blank lines (blank-line)."""
    piece: int = SMALLEST
    """Bytes a piece has; a function of the input alone."""


def piece_size(total: int) -> int:
    """Small enough to keep workers busy, large enough that a terabyte leaves no million files."""
    return min(max(1 << (total // 256).bit_length(), SMALLEST), LARGEST)


def find_files(inputs: Iterable[str]) -> list[Path | str]:
    """The files behind the inputs, in order; hf:... stays as it is."""
    found: list[Path | str] = []
    for name in inputs:
        path = Path(name)
        if name.startswith("hf:"):
            found.append(name)
        elif name == "stdlib" and not path.exists():
            root = Path(sysconfig.get_path("stdlib"))
            found += sorted(p for p in root.rglob("*.py") if not NOT_CORPUS.intersection(p.relative_to(root).parts))
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.name.endswith(FOLDER) and p.is_file() and not _hidden(p.relative_to(path)))
            if not inside:
                raise UserError(f"folder {name} holds no file ending in {' '.join(FOLDER)}; name the files themselves")
            found += inside
        elif not path.is_file():
            raise UserError(f"input {name} does not exist; give files, folders, hf:NAME[:CONFIG][:SPLIT] or stdlib")
        elif not name.endswith((*TEXT, *LINES, ".parquet")):
            raise UserError(f"input {name} is of no known kind ({' '.join((*TEXT, *LINES, '.parquet'))}); rename or convert it")
        else:
            found.append(path)
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def inventory(files: Iterable[Path | str]) -> list[list[Any]]:
    """What must be unchanged for finished work to count."""
    return [[f] if isinstance(f, str) else [str(f.resolve()), *_stamp(f)] for f in files]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def cut(files: Iterable[Path | str], reading: Reading) -> Iterator[Piece]:
    """Pieces in order. Small text files are put together."""
    together: list[Path] = []
    size = 0
    for file in files:
        small = isinstance(file, Path) and file.name.endswith(TEXT) and reading.documents == "file" and file.stat().st_size <= reading.piece
        if together and (not small or size + file.stat().st_size > reading.piece):
            yield _texts(together)
            together, size = [], 0
        if small:
            together.append(file)
            size += file.stat().st_size
        elif isinstance(file, str):
            yield from _stream(file, _hugging_face(file, reading.text_key), f"{file} row ", reading.piece)
        elif file.name.endswith((".gz", ".zst")):
            yield from _stream(str(file), _inflate(file), f"{file}:", reading.piece)
        elif file.name.endswith(".parquet"):
            yield from _row_groups(file, reading.text_key)
        else:
            yield from _ranges(file, "lines" if file.name.endswith(".jsonl") else "part", reading.piece)
    if together:
        yield _texts(together)


def _texts(files: list[Path]) -> Piece:
    stamps = [_stamp(file) for file in files]
    return Piece("texts", tuple(map(str, files)), str(stamps), size=sum(size for size, _ in stamps))


def _ranges(file: Path, kind: str, length: int) -> Iterator[Piece]:
    size, time = _stamp(file)
    for start in range(0, size, length):
        stop = min(start + length, size)
        yield Piece(kind, (str(file),), f"{size} {time}", start, stop, size=stop - start)


def _row_groups(file: Path, text_key: str) -> Iterator[Piece]:
    """Rows of every group, as many as make GROUP bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as problem:
        raise UserError(f"{file} is no parquet file ({problem}); copy it again") from None
    with parquet:
        schema, metadata = parquet.schema_arrow, parquet.metadata
        if text_key not in schema.names or not (pa.types.is_string(kind := schema.field(text_key).type) or pa.types.is_large_string(kind)):
            raise UserError(f'{file} has no text column "{text_key}" (it has {", ".join(schema.names)}); pass --text-key')
        size, time = _stamp(file)
        for group in range(metadata.num_row_groups):
            rows, width = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
            step = max(1, rows * GROUP // max(width, 1))
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                share = size * (stop - start) // max(metadata.num_rows, 1)
                yield Piece("rows", (str(file),), f"{size} {time}", start, stop, group, size=share)


def _stream(name: str, blocks: Iterator[tuple[bytes, int]], place: str, length: int) -> Iterator[Piece]:
    """Cut a stream of jsonl at line ends; every block comes with the bytes on disk behind it."""
    buffer, line, size = bytearray(), 1, 0
    for block, read in blocks:
        buffer += block
        size += read
        while len(buffer) >= length and (end := buffer.find(b"\n", length - 1) + 1):
            yield _carried(name, bytes(buffer[:end]), line, size, place)
            line += buffer.count(b"\n", 0, end)
            del buffer[:end]
            size = 0
    if buffer:
        yield _carried(name, bytes(buffer), line, size, place)


def _carried(name: str, data: bytes, line: int, size: int, place: str) -> Piece:
    return Piece("lines", (name, place), hashlib.blake2b(data, digest_size=16).hexdigest(), data=data, first_line=line, size=size)


def _inflate(file: Path) -> Iterator[tuple[bytes, int]]:
    """Decompress, member after member; a file that ends inside one is refused, which neither library does by itself."""
    import zstandard

    def start() -> Any:
        return zlib.decompressobj(31) if file.name.endswith(".gz") else zstandard.ZstdDecompressor().decompressobj()

    inflater, fresh = start(), True
    try:
        with file.open("rb") as source:
            while block := source.read(1 << 16):
                read = len(block)
                while block:
                    yield inflater.decompress(block), read
                    read, fresh = 0, False
                    if not inflater.eof:
                        break
                    block, inflater, fresh = inflater.unused_data.lstrip(b"\0"), start(), True  # zeros may pad a tape
    except (zlib.error, zstandard.ZstdError) as problem:
        raise UserError(f"{file} is damaged ({problem}); copy it again") from None
    if not fresh:
        raise UserError(f"{file} ends in the middle of its compressed data after {file.stat().st_size} bytes; copy it again")


def _hugging_face(name: str, text_key: str) -> Iterator[tuple[bytes, int]]:
    """hf:NAME[:CONFIG][:SPLIT] as jsonl, streamed."""
    import datasets

    dataset, *rest = name.removeprefix("hf:").split(":")
    if len(rest) == 1 and rest[0] in ("train", "validation", "test"):
        rest = ["", *rest]
    config, split = ([*rest, "", ""])[:2]
    try:
        rows = datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
        for row in rows:
            yield json.dumps({text_key: row[text_key]} if text_key in row else dict.fromkeys(row)).encode() + b"\n", 0
    except UserError:
        raise
    except Exception as problem:  # datasets, its file systems and the network raise what they like
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(f"{name} cannot be read ({reason}); check name, config and split (hf:NAME[:CONFIG][:SPLIT]) and the network") from None


def documents(piece: Piece, reading: Reading) -> Iterator[Document | BadLine]:
    """The texts of a piece in order."""
    if piece.kind == "texts":
        for path in piece.paths:
            yield _document(Path(path).read_bytes(), path)
    elif piece.kind == "rows":
        yield from _rows(piece, reading.text_key)
    elif piece.kind == "lines":
        yield from _lines(piece, reading.text_key)
    else:
        yield from _parts(piece, reading.documents)


def _document(data: bytes, path: str, *, offset: int = 0) -> Document | BadLine:
    """The text that begins at this byte of a file."""
    try:
        text = data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as problem:
        line = line_number(path, offset + problem.start)
        return BadLine(f"{path}:{line}", f"no UTF-8 (byte 0x{data[problem.start]:02x})")
    return Document(text, data[:HEAD])


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
                    yield BadLine(where, f'"{text_key}" is null') if text is None else Document(text, text.encode()[:HEAD])
                row += len(batch)
                if row >= piece.stop:
                    return
    except UnicodeDecodeError as problem:
        raise UserError(f"{piece.paths[0]} row group {piece.group} holds text that is no UTF-8 ({problem.reason}); write it again") from None
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
                found = _json(line, text_key, path)
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
    except ValueError as problem:
        return BadLine(where, f"no JSON ({problem})")
    except RecursionError:
        return BadLine(where, "JSON nested too deep")
    if not isinstance(row, dict) or text_key not in row:
        return BadLine(where, f'no "{text_key}" (it has {", ".join(map(str, row)) or "nothing"}; --text-key)' if isinstance(row, dict) else "no JSON object")
    if not isinstance(row[text_key], str):
        return BadLine(where, f'"{text_key}" is {type(row[text_key]).__name__}, no text')
    try:
        return Document(row[text_key], row[text_key].encode()[:HEAD])
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


def _break_after(file: Any, at: int, size: int, patterns: tuple[re.Pattern[bytes], ...]) -> int:
    """Where the first break after `at` lies; both neighbours of a cut find the same. Without one nearby, a letter's beginning."""
    if at in (0, size):
        return at
    file.seek(at - 1)
    window = file.read(SMALLEST)
    if found := next(filter(None, (pattern.search(window) for pattern in patterns)), None):
        return at - 1 + found.end()
    return min(size, at + next(i for i, byte in enumerate(window[1:5] + b"\0") if byte & 0xC0 != 0x80))
