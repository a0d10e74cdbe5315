"""What one preparation was: OUTPUT.manifest.json, beside OUTPUT.train.bin, OUTPUT.train.idx and so on.

In: what `prepare` did. Out: the same, read back and checked, found from the prefix of any split; None for Megatron's own files,
which have no manifest.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from megalite.errors import UserError

SPLITS = ("train", "valid", "test")


def output_of(prefix: str | Path) -> str:
    """corpus.train -> corpus: the --output that a split belongs to."""
    name = str(prefix)
    stem, _, split = name.rpartition(".")
    return stem if split in SPLITS else name


def prepare_line(prefix: str | Path) -> str:
    """The command that would make this shard."""
    return f"megalite prepare INPUT... --output {output_of(prefix)} --tokenizer NAME|FILE|train:bpe"


def write_atomically(path: Path, data: bytes) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Manifest(BaseModel):
    """Everything about the shards that the shards themselves do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    key: str
    """Hash of inputs and settings: a second run with the same key has nothing to do."""
    tokenizer: str
    """The tokenizer's fingerprint."""
    vocab_size: int
    special: dict[str, int]
    """Special tokens by role: eos, pad, mask, cls, sep, unk."""
    sentences: bool
    """Sequences are sentences (BERT); else a document is one sequence that ends with eos (GPT)."""
    counts: dict[str, dict[str, int]]
    """Documents, sequences and tokens of every split."""
    bad_lines: int
    settings: dict[str, Any]
    versions: dict[str, str]

    @staticmethod
    def path(prefix: str | Path) -> Path:
        return Path(f"{output_of(prefix)}.manifest.json")

    @classmethod
    def find(cls, prefix: str | Path) -> Manifest | None:
        """The manifest beside a shard, or None for files that Megatron made."""
        path = cls.path(prefix)
        if not path.is_file():
            return None
        try:
            return cls.model_validate(json.loads(path.read_bytes()))
        except (ValueError, ValidationError) as problem:
            raise UserError(
                f"{path} is no manifest of `megalite prepare` ({str(problem).splitlines()[0]}); prepare the corpus again"
            ) from None

    def save(self, prefix: str | Path) -> None:
        write_atomically(self.path(prefix), json.dumps(self.model_dump(), indent=2).encode() + b"\n")
