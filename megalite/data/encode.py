"""Turns pieces of text into parts of shards, in worker processes.

In: `Piece`s, a tokenizer's folder and how to cut. Out: for every piece a file KEY.part with, for every split, its tokens, the lengths
of its sequences and where its documents end, written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megalite.data.documents import BadLine, Document, documents
from megalite.data.inputs import Piece, Reading
from megalite.data.manifest import SPLITS
from megalite.data.parts import part_path, write_part
from megalite.data.shards import token_dtype
from megalite.data.tokenizer import Tokenizer, open_tokenizer

BATCH = 1 << 18  # characters tokenized at once; tokenizers needs some hundred bytes of memory for each
SLICE = 1 << 18  # longest text the tokenizer gets in one go
# As BREAKS in documents.py; the last for JSON, whose lines end in marks.
CUTS = tuple(map(re.compile, (r"[^\W_](?=\n)", r"[^\W_](?=\s)", r'[^\W_](?=[",:;=()<>{}\[\]])')))
REPORTED = 10  # broken lines a part remembers; all are counted
TERMINATOR = re.compile(r"[.!?…。！？؟।]")  # noqa: RUF001


@dataclass(frozen=True)
class Recipe:
    """All that decides what a part holds, beside its piece."""

    reading: Reading
    sentences: bool
    splits: tuple[float, float, float]
    seed: int
    tokenizer: str
    """Folder of the tokenizer."""
    fingerprint: str
    format: int = 1

    @property
    def key(self) -> str:
        parts = [self.format, self.reading.text_key, self.reading.documents, self.sentences, self.splits, self.seed, self.fingerprint]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def split_of(head: bytes, splits: tuple[float, float, float], seed: int) -> int:
    """The split of a document, by its own beginning: equal documents never land on both sides."""
    digest = hashlib.blake2b(head, digest_size=8, key=str(seed).encode()).digest()
    share = int.from_bytes(digest, "little") / 2**64
    return 0 if share < splits[0] else 1 if share < splits[0] + splits[1] else 2 if splits[2] else 0


def encode_part(piece: Piece, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, bytes | np.ndarray]:
    """Everything a piece gives: for every split tokens, lengths and ends; and a summary."""
    collected: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[], [], []]
    summary: dict[str, Any] = {"documents": 0, "bytes": 0, "empty": 0, "bad": 0, "reported": []}
    batch: list[Document] = []
    size = 0

    def flush() -> None:
        for split, found in enumerate(_encode_batch(batch, recipe, tokenizer)):
            collected[split].append(found)
        batch.clear()

    for found in documents(piece, recipe.reading):
        if isinstance(found, BadLine):
            summary["bad"] += 1
            if len(summary["reported"]) < REPORTED:
                summary["reported"].append(f"{found.where}: {found.why}")
            continue
        summary["bytes"] += len(found.text)
        if found.first and found.last and not found.text.strip():
            summary["empty"] += 1
            continue
        summary["documents"] += found.last
        batch.append(found)
        size += len(found.text)
        if size >= BATCH:
            flush()
            size = 0
    flush()
    dtype = token_dtype(tokenizer.vocab_size)
    part: dict[str, Any] = {"summary": np.frombuffer(json.dumps(summary).encode(), np.uint8)}
    for name, found in zip(SPLITS, collected, strict=True):
        tokens, lengths, ends = zip(*found, strict=True)
        sequences = np.cumsum([0, *map(len, lengths)])
        part[f"{name}_tokens"] = np.concatenate(tokens).astype(dtype)
        part[f"{name}_lengths"] = np.concatenate(lengths).astype(np.int32)
        part[f"{name}_ends"] = np.concatenate([e + before for e, before in zip(ends, sequences[:-1], strict=True)])
    return part


def _encode_batch(batch: list[Document], recipe: Recipe, tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, lengths of sequences, ends of documents) of every split."""
    texts: list[str] = []
    unit_of_text: list[int] = []  # a unit becomes a sequence: a sentence, or a document
    document_of_unit: list[int] = []
    for number, document in enumerate(batch):
        for unit in split_sentences(document.text) if recipe.sentences else (document.text,):
            for text in slices(unit):
                texts.append(text)
                unit_of_text.append(len(document_of_unit))
            document_of_unit.append(number)
    flat, text_lengths = tokenizer.encode_flat(texts)
    lengths = np.bincount(unit_of_text, text_lengths, minlength=len(document_of_unit)).astype(np.int64) if texts else np.empty(0, np.int64)
    owner = np.array(document_of_unit, np.int64)
    first, last = (np.array([getattr(document, end) for document in batch], bool) for end in ("first", "last"))
    if not recipe.sentences and len(batch):
        flat = np.insert(flat, np.cumsum(lengths)[last], tokenizer.special["eos"])
        lengths += last
    splits = np.array([split_of(document.head, recipe.splits, recipe.seed) for document in batch], np.int64)
    for split in range(len(SPLITS)):
        mine = splits[owner] == split if len(owner) else np.empty(0, bool)
        tokens = flat if mine.all() else flat[np.repeat(mine, lengths)]
        kept = mine & (lengths > 0)
        sequences = np.bincount(owner[kept], minlength=len(batch)).astype(np.int64)  # of every document
        closes = last & (splits == split) & ((sequences > 0) | ~first)  # a document without a sentence is none
        yield tokens, lengths[kept], np.cumsum(sequences)[closes]


def split_sentences(text: str) -> Iterator[str]:
    """Sentences; a line end is always one."""
    from sentencex import segment  # pyright: ignore[reportAttributeAccessIssue]

    for line in text.split("\n"):
        line = line.strip()
        if not TERMINATOR.search(line, 0, len(line) - 1):
            if line:
                yield line
        else:
            yield from filter(None, map(str.strip, segment("en", line)))


def slices(text: str) -> Iterator[str]:
    """A text in pieces short enough for the tokenizer."""
    start = 0
    while len(text) - start > SLICE:
        window = start + SLICE // 2, start + SLICE
        found = next(filter(None, (pattern.search(text, *window) for pattern in CUTS)), None)
        end = found.end() if found else start + SLICE
        yield text[start:end]
        start = end
    yield text[start:]


def begin(recipe: Recipe, folder: Path) -> Callable[[Piece], dict[str, Any]]:
    """What a worker does for every piece: write its part, return its summary."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker, one core
    tokenizer, key = open_tokenizer(recipe.tokenizer), recipe.key

    def work(piece: Piece) -> dict[str, Any]:
        part = encode_part(piece, recipe, tokenizer)
        write_part(part_path(folder, piece, key), part)
        return json.loads(bytes(part["summary"]))

    return work
