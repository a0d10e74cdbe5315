"""Finds text and cuts it into pieces.

In: what the user named (files, folders, hf:NAME, stdlib). Out: `Piece`s of a few MB in a fixed order, whose cuts depend on the
input alone, never on who reads them. What can be read from the middle (text, jsonl, parquet) is cut by position and read by whoever
works on it (`documents.py`); what cannot (gzip, zstd, Hugging Face streams) is cut while it streams by, and its pieces carry their lines.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import UserError

GROUP = 32 << 20  # bytes of a parquet piece: reading the middle of a row group means decoding its beginning
SMALLEST, LARGEST = 1 << 20, 16 << 20  # a piece in bytes
TEXT = (".txt", ".text", ".md", ".rst", ".py")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
FOLDER = (".txt", *LINES, ".parquet")  # what a folder contributes: not the README beside the data
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


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
            if not name.removeprefix("hf:").split(":")[0]:
                raise UserError(f"input {name} names no data set; give hf:NAME[:CONFIG][:SPLIT]")
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
            fault = "is neither file nor folder" if path.exists() else "does not exist"
            raise UserError(f"input {name} {fault}; give files, folders, hf:NAME[:CONFIG][:SPLIT] or stdlib")
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
        if isinstance(file, Path) and file.name.endswith(TEXT) and reading.documents == "file" and _stamp(file)[0] <= reading.piece:
            if together and size + _stamp(file)[0] > reading.piece:
                yield _texts(together)
                together, size = [], 0
            together.append(file)
            size += _stamp(file)[0]
            continue
        if together:
            yield _texts(together)
            together, size = [], 0
        if isinstance(file, str):
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
    for row in hugging_face_rows(name):
        yield json.dumps({text_key: row[text_key]} if text_key in row else dict.fromkeys(row)).encode() + b"\n", 0


def hugging_face_rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of hf:NAME[:CONFIG][:SPLIT], streamed."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)  # it tells of every try; one line from us says it all
    dataset, *rest = name.removeprefix("hf:").split(":")
    if len(rest) == 1 and rest[0] in ("train", "validation", "test"):
        rest = ["", *rest]
    config, split = ([*rest, "", ""])[:2]
    try:
        yield from datasets.load_dataset(dataset, config or None, split=split or "train", streaming=True)
    except UserError:
        raise
    except Exception as problem:  # datasets, its file systems and the network raise what they like
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise UserError(
            f"{name} cannot be read ({reason}); check name, config and split (hf:NAME[:CONFIG][:SPLIT]) and the network"
        ) from None
