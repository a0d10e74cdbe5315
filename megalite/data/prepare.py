"""`megalite prepare`: raw text -> a tokenizer and Megatron shards, in parallel and restartable.

In: a `Preparation` (what to read, which tokenizer, how to split). Out: OUTPUT.train/.valid/.test.bin and .idx, OUTPUT.tokenizer/ and
OUTPUT.manifest.json, byte for byte the same for any number of workers and after any number of kills. Finished pieces wait in
OUTPUT.parts/ under the hash of their content and settings; what lies there is taken over, the rest is done, then all is put together
and the folder goes. Memory holds a few pieces a worker, whatever the input.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from megalite import __version__
from megalite.data.documents import BadLine, documents
from megalite.data.encode import REPORTED, Recipe, encode_all, split_of
from megalite.data.inputs import Piece, Reading, cut, find_files, inventory, piece_size
from megalite.data.manifest import SPLITS, Manifest
from megalite.data.parts import part_path, read_part, work_folder
from megalite.data.progress import Bar
from megalite.data.shards import Shard, Writer
from megalite.data.tokenizer import Tokenizer, open_tokenizer
from megalite.data.vocabulary import TRAINED, train_tokenizer
from megalite.errors import UserError

SAMPLE = 100 << 20  # bytes of text a new tokenizer is trained on
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


def prepare(preparation: Preparation, *, console: Console | None = None) -> Manifest:
    """Do what is left to do; at once if nothing is. Raises UserError for what cannot be done."""
    _check(preparation)
    try:
        return _prepare(preparation, console or Console(soft_wrap=True, highlight=False))
    except BrokenPipeError:  # nobody reads what we print
        raise
    except OSError as problem:
        what = f"{problem.filename or preparation.output}: {problem.strerror or problem}"
        raise UserError(f"{what}; see to that and run the same command again, it goes on where it was") from None


def _prepare(preparation: Preparation, console: Console) -> Manifest:
    files = find_files(preparation.inputs)
    tokenizer = None if preparation.tokenizer in TRAINED else open_tokenizer(preparation.tokenizer)
    key = _key(preparation, files, tokenizer)
    if finished := _finished(preparation, key):
        if Path(f"{preparation.output}.parts").is_dir():
            with work_folder(preparation.output):
                pass  # killed between its last two steps
        console.print(f"{preparation.output} is prepared already, with these inputs and settings: nothing to do")
        return finished
    began = time.monotonic()
    with work_folder(preparation.output) as folder:
        total = sum(file.stat().st_size for file in files if isinstance(file, Path))
        reading = Reading(preparation.text_key, preparation.documents, piece_size(total))
        if tokenizer is None:
            tokenizer = _trained(preparation, files, reading, folder, key, console)
        recipe = _recipe(preparation, reading, tokenizer, folder)
        parts, bad, size = _encode(preparation, files, recipe, folder, total, console)
        manifest = _assemble(preparation, parts, recipe, tokenizer, key, bad)
    seconds = time.monotonic() - began
    for split, counts in manifest.counts.items():
        console.print(f"  {split}: {counts['documents']:,} documents, {counts['sequences']:,} sequences, {counts['tokens']:,} tokens")
    tokens = sum(counts["tokens"] for counts in manifest.counts.values())
    skipped = f", {bad:,} broken lines skipped" if bad else ""
    console.print(
        f"prepared {preparation.output}: {size / 1e6:.1f} MB of text, {tokens:,} tokens, vocabulary {manifest.vocab_size:,}{skipped}, "
        f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    )
    return manifest


def _check(p: Preparation) -> None:
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


def _key(p: Preparation, files: list[Path | str], tokenizer: Tokenizer | None) -> str:
    """Names inputs and settings, except those that change no byte of the output."""
    settings = p.model_dump(exclude={"workers", "output", "inputs"}) | {"tokenizer": tokenizer.fingerprint if tokenizer else p.tokenizer}
    return hashlib.blake2b(json.dumps([__version__, settings, inventory(files)]).encode(), digest_size=16).hexdigest()


def _finished(p: Preparation, key: str) -> Manifest | None:
    try:
        manifest = Manifest.find(p.output)
        if manifest is None or manifest.key != key:
            return None
        whole = all(Shard(f"{p.output}.{split}").num_tokens == counts["tokens"] for split, counts in manifest.counts.items())
        return manifest if whole and open_tokenizer(f"{p.output}.tokenizer").fingerprint == manifest.tokenizer else None
    except UserError:
        return None  # something was deleted, cut or damaged: make it again


def _recipe(p: Preparation, reading: Reading, tokenizer: Tokenizer, folder: Path) -> Recipe:
    sentences = "mask" in tokenizer.special if p.split_sentences is None else p.split_sentences
    if not sentences and "eos" not in tokenizer.special:
        raise UserError(
            f"tokenizer {p.tokenizer} has no end-of-text token to end a document with; pass --split-sentences (BERT) or another --tokenizer"
        )
    tokenizer.save(folder / "tokenizer")
    return Recipe(reading, sentences, p.splits, p.seed, str(folder / "tokenizer"), tokenizer.fingerprint)


def _trained(p: Preparation, files: list[Path | str], reading: Reading, folder: Path, key: str, console: Console) -> Tokenizer:
    """A new tokenizer from at most SAMPLE bytes of training documents, taken evenly; kept for a restart."""
    kept = folder / f"tokenizer-{key}"
    if kept.is_dir():
        return open_tokenizer(kept)
    total = sum(file.stat().st_size for file in files if isinstance(file, Path))
    every = max(1, -(-total // SAMPLE))
    size = p.vocab_size or 32000

    def texts() -> Iterator[str]:
        taken = 0
        for number, piece in enumerate(cut(files, reading)):
            if number % every:
                continue
            for found in documents(piece, reading):
                if isinstance(found, BadLine):
                    if p.bad_lines == "refuse":
                        raise _refused([f"{found.where}: {found.why}"], 1)
                elif found.text.strip() and split_of(found.head, p.splits, p.seed) == 0:
                    taken += len(found.text)
                    yield found.text
            bar.advance(piece.size)
            if taken >= SAMPLE:
                return

    began = time.monotonic()
    with Bar(console, f"training {p.tokenizer[6:]} tokenizer", total // every) as bar:
        found = texts()
        if (first := next(found, None)) is None:
            raise UserError(f"no text to train a tokenizer on in {' '.join(p.inputs)}; check the inputs and --text-key, or --splits 1,0,0")
        tokenizer = train_tokenizer(p.tokenizer, chain([first], found), vocab_size=size)
    console.print(f"trained a {p.tokenizer[6:]} tokenizer with {tokenizer.vocab_size:,} entries in {time.monotonic() - began:.1f} s")
    if tokenizer.vocab_size < size:
        console.print(f"  (asked for {size:,}: the text gives no more)")
    temporary = folder / "tokenizer.tmp"
    tokenizer.save(temporary)
    temporary.rename(kept)
    return open_tokenizer(kept)


def _refused(reported: list[str], count: int) -> UserError:
    more = f" (and {count - 1} more broken lines there)" if count > 1 else ""
    return UserError(f"{reported[0]}{more}; mend it, or leave such lines out with --bad-lines skip")


def _encode(
    p: Preparation, files: list[Path | str], recipe: Recipe, folder: Path, total: int, console: Console
) -> tuple[list[Path], int, int]:
    """Every piece's part, in order; how many lines were broken; bytes of text."""
    key = recipe.key
    parts: list[Path] = []
    sizes: dict[int, int] = {}
    reported: list[str] = []
    seen = {"bad": 0, "bytes": 0, "documents": 0, "reused": 0}

    def count(number: int, summary: dict) -> None:
        if summary["bad"] and p.bad_lines == "refuse":
            raise _refused(summary["reported"], summary["bad"])
        reported.extend(summary["reported"])
        for name in ("bad", "bytes", "documents"):
            seen[name] += summary[name]
        bar.advance(sizes.pop(number))

    def left() -> Iterator[tuple[int, Piece]]:
        for number, piece in enumerate(cut(files, recipe.reading)):
            path = part_path(folder, piece, key)
            parts.append(path)
            sizes[number] = piece.size
            if summary := _kept(path):
                seen["reused"] += 1
                count(number, summary)
            else:
                yield number, piece

    workers = p.workers or len(os.sched_getaffinity(0))
    with Bar(console, "tokenizing", total) as bar:
        for number, summary in encode_all(left(), recipe, folder, workers=workers):
            count(number, summary)
    if seen["reused"]:
        console.print(f"took over {seen['reused']} of {len(parts)} pieces from an earlier run")
    for line in sorted(reported)[:REPORTED]:
        console.print(f"  skipped {line}", highlight=False, markup=False)
    if not seen["documents"]:
        raise UserError(f"no text in {' '.join(p.inputs)}: 0 documents in {len(files)} files; check the inputs and --text-key")
    return parts, seen["bad"], seen["bytes"]


def _kept(path: Path) -> dict | None:
    """The summary of a part that an earlier run made."""
    try:
        return read_part(path)[0] if path.is_file() else None
    except UserError:
        return None  # damaged


def _assemble(p: Preparation, parts: list[Path], recipe: Recipe, tokenizer: Tokenizer, key: str, bad: int) -> Manifest:
    """All parts behind one another into the shards; then the tokenizer, the shards and last the manifest take their names."""
    used = [split for split, share in zip(SPLITS, p.splits, strict=True) if share]
    with ExitStack() as stack:
        writers = {split: Writer(f"{p.output}.{split}", vocab_size=tokenizer.vocab_size) for split in used}
        for writer in writers.values():
            stack.callback(writer.discard)
        for path in parts:
            _, array = read_part(path)
            for split, writer in writers.items():
                writer.add(array(f"{split}_tokens"), lengths=array(f"{split}_lengths"), ends=array(f"{split}_ends"))
        if not writers["train"].num_documents:
            held = ", ".join(f"{split} {writer.num_documents}" for split, writer in writers.items())
            raise UserError(
                f"the training split is empty (documents: {held}); give more documents, --documents line or blank-line, "
                "another --seed, or --splits 1,0,0"
            )
        Manifest.path(p.output).unlink(missing_ok=True)  # from here to the end, OUTPUT.parts without a manifest says: unfinished
        tokenizer.save(f"{p.output}.tokenizer")
        for split in SPLITS:
            if split in writers:
                writers[split].commit()
            else:
                for ending in ("idx", "bin"):
                    Path(f"{p.output}.{split}.{ending}").unlink(missing_ok=True)
        counts = {
            split: {"documents": w.num_documents, "sequences": w.num_sequences, "tokens": w.num_tokens} for split, w in writers.items()
        }
        settings = p.model_dump(mode="json", exclude={"workers", "output"})
        manifest = Manifest(
            key=key, tokenizer=recipe.fingerprint, vocab_size=tokenizer.vocab_size, special=tokenizer.special, counts=counts,
            sentences=recipe.sentences, bad_lines=bad, settings=settings, versions=_versions(),
        )  # fmt: skip
        manifest.save(p.output)
    return manifest


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"megalite": __version__} | {name: version(name) for name in ("tokenizers", "sentencepiece", "sentencex")}
