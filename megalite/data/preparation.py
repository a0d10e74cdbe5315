"""What `megalite prepare` is asked for: the text, the tokenizer, the splits, what is cleaned. Bad values are refused before any work.

In: flags.  Out: a `Preparation`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from megalite.data.vocabulary import TRAINED
from megalite.errors import UserError

SIZES = 16, 1 << 20  # of a tokenizer trained here
WORKERS = 1024


class Preparation(BaseModel):
    """Text to shards."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    inputs: tuple[str, ...]
    """Files (.txt .py .md .jsonl .jsonl.gz .jsonl.zst .parquet), folders, hf:NAME[:CONFIG][:SPLIT], or stdlib: Python's own library."""
    output: str
    """Prefix of what is written: OUTPUT.train.bin and so on."""
    tokenizer: str
    """tokenizer.json, SentencePiece .model, folder, Hugging Face name, or train:bpe, train:wordpiece, train:unigram."""
    vocab_size: int | None = None
    """Size of a tokenizer trained here; left out: 32000."""
    workers: int | None = None
    """Processes; left out: one a core."""
    splits: tuple[float, float, float] = (0.98, 0.01, 0.01)
    """Shares of the documents for training, validation and test."""
    text_key: str = "text"
    """Field of jsonl, column of parquet and Hugging Face, that holds the text."""
    documents: Literal["file", "line", "blank-line"] = "file"
    """A text file is one document, one a line, or one between blank lines."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """What to do about broken JSON and text that is no UTF-8."""
    split_sentences: bool | None = None
    """Make every sentence a sequence, as BERT needs; left out: if the tokenizer has a mask token."""
    seed: int = 0
    """Decides which document goes into which split."""
    clean: str | None = None
    """YAML file that says what is repaired, removed and hidden (docs/cleaning.md); left out: text is taken as it is."""
    report: bool = False
    """Write OUTPUT.removed.jsonl: a line for every document that cleaning changed or removed, with place and reason."""


def check(p: Preparation) -> None:
    if not p.inputs:
        raise UserError("megalite prepare got no input; name files, folders, hf:NAME[:CONFIG][:SPLIT] or stdlib")
    if p.output.endswith("/") or Path(p.output).name in ("", ".."):
        raise UserError(f"--output {p.output!r} names no file; give the beginning of what is written, such as data/corpus")
    if not p.tokenizer.strip():
        raise UserError(f"--tokenizer {p.tokenizer!r} names none; give a file, a folder, a Hugging Face name or train:bpe")
    shares = ",".join(map(str, p.splits))
    if not all(0 <= share <= 1 for share in p.splits):
        raise UserError(f"--splits {shares}: a share is from 0 to 1; for instance 0.98,0.01,0.01")
    if abs(sum(p.splits) - 1) > 1e-6:
        raise UserError(f"--splits {shares} sum to {sum(p.splits):g}, shares must sum to 1; for instance 0.98,0.01,0.01")
    if p.splits[0] == 0:
        raise UserError("--splits gives 0 to training; the first share must be above 0")
    if p.tokenizer.startswith("train:") and p.tokenizer not in TRAINED:
        raise UserError(f"--tokenizer {p.tokenizer} is not one of {', '.join(TRAINED)}; choose one, or give a file")
    if p.vocab_size is not None and p.tokenizer not in TRAINED:
        raise UserError(
            f"--vocab-size {p.vocab_size} is for a tokenizer trained here, but --tokenizer {p.tokenizer} has its own; leave it out"
        )
    if p.vocab_size is not None and not SIZES[0] <= p.vocab_size <= SIZES[1]:
        too = "small" if p.vocab_size < SIZES[0] else "large"
        raise UserError(f"--vocab-size {p.vocab_size} is too {too}, {SIZES[0]} to {SIZES[1]} can be trained; choose some ten thousands")
    if p.workers is not None and not 1 <= p.workers <= WORKERS:
        raise UserError(f"--workers {p.workers} is not from 1 to {WORKERS}; leave it out for one a core")
    if p.report and not p.clean:
        raise UserError("--report tells what cleaning did, but there is no --clean FILE.yaml; give one or leave --report out")
