"""Token shards on disk: Megatron's indexed data set (PREFIX.bin and PREFIX.idx, "MMIDIDX" version 1), both ways.

In: arrays of token ids, cut into sequences and documents. Out: files Megatron-LM reads byte for byte, and a memory-mapped
`Shard` over such files, its own or Megatron's. PREFIX.bin is the raw token stream, little endian. PREFIX.idx is, without
padding: 9 bytes magic | u64 version | u8 type code | u64 S sequences | u64 D boundaries | i32[S] lengths in tokens |
i64[S] offsets in bytes | i64[D] first sequence of every document, then S (so D = documents + 1) | optional i8[S] modes.
Opening reads a few hundred numbers whatever the size. What was prepared, and with which tokenizer, stands in the
manifest beside the shards (`manifest.py`).
"""

from __future__ import annotations

import mmap
import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megalite.data.manifest import Manifest, output_of, prepare_line
from megalite.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, type code, sequences, boundaries: 34 bytes
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CHUNK = 1 << 20  # numbers copied at a time


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron picks for a vocabulary of this size."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


class Shard:
    """PREFIX.bin and PREFIX.idx, memory-mapped; a truncated or foreign file is refused."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        if Path(f"{output_of(prefix)}.parts").is_dir() and not Manifest.path(prefix).is_file():
            raise UserError(f"the preparation of {output_of(prefix)} was not finished; run the same `megalite prepare` again, it goes on")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise UserError(f"shard file {path} does not exist; make it: {prepare_line(self.prefix)}")
        index = _map(self.idx_path)
        self.dtype, num_sequences, num_boundaries = self._read_header(index)
        at = HEADER.size
        # The header is 34 bytes long, so these views are unaligned: index and slice them, but never hand one whole to a
        # numpy function that would first copy it (np.searchsorted does; `bisect` does not).
        self.lengths = np.frombuffer(index, "<i4", num_sequences, at)
        self.offsets = np.frombuffer(index, "<i8", num_sequences, at + 4 * num_sequences)
        self.boundaries = np.frombuffer(index, "<i8", num_boundaries, at + 12 * num_sequences)
        self._check_against_bin()
        self._stream = np.frombuffer(_map(self.bin_path), self.dtype)

    def _read_header(self, index: Any) -> tuple[np.dtype[Any], int, int]:
        size = len(index)
        if size < HEADER.size:
            raise UserError(f"{self.idx_path} holds {size} bytes, its header alone has {HEADER.size}: it is truncated; {self._cure()}")
        magic, version, code, num_sequences, num_boundaries = HEADER.unpack(index[: HEADER.size])
        if magic != MAGIC:
            raise UserError(f"{self.idx_path} starts with {magic!r}, not {MAGIC!r}: it is no Megatron index; {self._cure()}")
        if version != VERSION:
            raise UserError(f"{self.idx_path} has format version {version}, this reads version {VERSION}; {self._cure()}")
        if CODES.get(code, "f")[-2] not in "ui":
            raise UserError(f"{self.idx_path} has type code {code}, tokens are integers (codes 1-5 and 8); {self._cure()}")
        expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
        if size not in (expected, expected + num_sequences):  # modes may follow
            raise UserError(
                f"{self.idx_path} holds {size} bytes, its header promises {expected} ({num_sequences} sequences, "
                f"{num_boundaries} boundaries): it is truncated or damaged; {self._cure()}"
            )
        return np.dtype(CODES[code]), num_sequences, num_boundaries

    def _check_against_bin(self) -> None:
        """Ends exactly, offsets and boundaries at a thousand places."""
        count, width = len(self.lengths), self.dtype.itemsize
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * width if count else 0
        actual = self.bin_path.stat().st_size
        if actual != expected:
            raise UserError(
                f"{self.bin_path} holds {actual} bytes, {self.idx_path.name} promises {expected}: "
                f"it is truncated or of another preparation; {self._cure()}"
            )
        at = np.unique(np.linspace(0, max(count - 2, 0), 1024).astype(np.int64)) if count > 1 else np.empty(0, np.int64)
        contiguous = (self.offsets[at] + self.lengths[at].astype(np.int64) * width == self.offsets[at + 1]).all()
        ends = [0, 0] if not count else [int(self.offsets[0]), int(self.lengths[0] < 0)]
        boundaries_fit = len(self.boundaries) > 0 and self.boundaries[0] == 0 and self.boundaries[-1] == count
        if not contiguous or any(ends) or not boundaries_fit:
            raise UserError(f"{self.idx_path} contradicts itself (offsets, lengths or document boundaries): it is damaged; {self._cure()}")

    def _cure(self) -> str:
        return f"copy it again or run {prepare_line(self.prefix)}"

    @property
    def num_tokens(self) -> int:
        return len(self._stream)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.boundaries) - 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the flat stream, a read-only view."""
        return self._stream[start:stop]

    def sequence(self, index: int) -> np.ndarray:
        start = int(self.offsets[index]) // self.dtype.itemsize
        return self._stream[start : start + int(self.lengths[index])]

    def sequence_at(self, token: int) -> int:
        """The sequence that holds this token of the flat stream."""
        return bisect_right(self.offsets, token * self.dtype.itemsize) - 1

    def document_at(self, sequence: int) -> int:
        """The document that holds this sequence."""
        return bisect_right(self.boundaries, sequence) - 1

    def document(self, index: int) -> range:
        """The sequences of a document."""
        return range(int(self.boundaries[index]), int(self.boundaries[index + 1]))


def _map(path: Path) -> Any:
    if not path.stat().st_size:
        return b""  # an empty file cannot be mapped
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class Writer:
    """Streams documents into PREFIX.bin and PREFIX.idx; both appear whole at the end, or not at all.

    Lengths go to a file as they come, so memory does not grow with the number of documents. Leaving the `with` block by an
    exception removes what was written.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        self.prefix = str(prefix)
        self.dtype = token_dtype(vocab_size)
        self._paths = {part: Path(f"{prefix}.{part}.tmp") for part in ("bin", "idx", "lengths", "documents")}
        self._paths["bin"].parent.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, BinaryIO] = {part: path.open("w+b") for part, path in self._paths.items()}
        self.num_tokens = self.num_sequences = self.num_documents = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()

    def add(self, tokens: np.ndarray, *, lengths: np.ndarray | None = None, ends: np.ndarray | None = None) -> None:
        """Append tokens cut into sequences of these `lengths`; a document ends after so many of them, for every entry of `ends`.

        Left out: one sequence, one document. Sequences after the last end begin a document that the next call goes on with.
        """
        lengths = np.array([len(tokens)]) if lengths is None else lengths
        ends = np.array([len(lengths)]) if ends is None else ends
        assert int(lengths.sum()) == len(tokens), "lengths do not cover the tokens"
        self._files["bin"].write(tokens.astype(self.dtype).tobytes())
        self._files["lengths"].write(lengths.astype("<i4").tobytes())
        self._files["documents"].write((ends + self.num_sequences).astype("<i8").tobytes())
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)
        self.num_documents += len(ends)

    def commit(self) -> None:
        index, lengths, documents = self._files["idx"], self._files["lengths"], self._files["documents"]
        code = next(code for code, name in CODES.items() if np.dtype(name) == self.dtype)
        index.write(HEADER.pack(MAGIC, VERSION, code, self.num_sequences, self.num_documents + 1))
        for chunk in _chunks(lengths, "<i4"):
            index.write(chunk.tobytes())
        offset = 0
        for chunk in _chunks(lengths, "<i4"):
            ends = offset + np.cumsum(chunk, dtype=np.int64) * self.dtype.itemsize
            index.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        index.write(struct.pack("<q", 0))
        boundary = 0
        for chunk in _chunks(documents, "<i8"):
            index.write(chunk.tobytes())
            boundary = int(chunk[-1])
        assert boundary == self.num_sequences, "the last document was left open"
        for part in ("bin", "idx"):
            self._files[part].flush()
            os.fsync(self._files[part].fileno())
        # The old index goes first and the new one comes last: at no time does an index lie beside a foreign .bin.
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for part in ("bin", "idx"):
            self._paths[part].replace(f"{self.prefix}.{part}")
        self.discard()
        _sync_folder(self._paths["bin"].parent)

    def discard(self) -> None:
        """Close and remove the temporary files."""
        for part, file in self._files.items():
            file.close()
            self._paths[part].unlink(missing_ok=True)


def _chunks(file: BinaryIO, dtype: str) -> Iterator[np.ndarray]:
    file.seek(0)
    while data := file.read(CHUNK * np.dtype(dtype).itemsize):
        yield np.frombuffer(data, dtype)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unigram_entropy(shard: Shard) -> float:
    """Nats a token when only the tokens' frequencies are known: what a model that ignores its context can reach."""
    counts = np.zeros(1, np.int64)
    for start in range(0, shard.num_tokens, CHUNK):
        part = np.bincount(shard.tokens(start, start + CHUNK))
        if len(part) > len(counts):
            counts = np.pad(counts, (0, len(part) - len(counts)))
        counts[: len(part)] += part
    share = counts[counts > 0] / max(shard.num_tokens, 1)
    return float((share * -np.log(share)).sum())
