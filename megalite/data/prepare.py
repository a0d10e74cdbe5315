"""`megalite prepare`: raw text -> a tokenizer and Megatron shards, in parallel and restartable.

In: a `Preparation` (what to read, which tokenizer, how to split). Out: OUTPUT.train/.valid/.test.bin and .idx, OUTPUT.tokenizer/ and
OUTPUT.manifest.json, byte for byte the same for any number of workers and after any number of kills. Finished pieces wait in
OUTPUT.parts/ under the hash of their content and settings; what lies there is taken over, the rest is done, then all is put together
and the folder goes. Memory holds a few pieces a worker, whatever the input.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from megalite import __version__
from megalite.data import card, clean, sweep
from megalite.data.clean import Cleaning
from megalite.data.documents import BadLine, documents, refuse
from megalite.data.encode import REPORTED, Recipe, begin, split_of
from megalite.data.inputs import Piece, Reading, cut, find_files, inventory, piece_size
from megalite.data.manifest import SPLITS, Manifest
from megalite.data.parts import make_parts, read_part, work_folder
from megalite.data.preparation import Preparation, check
from megalite.data.progress import Bar
from megalite.data.shards import Shard, Writer
from megalite.data.sweep import Record
from megalite.data.tokenizer import Tokenizer, open_tokenizer
from megalite.data.vocabulary import TRAINED, train_tokenizer
from megalite.errors import UserError

SAMPLE = 100 << 20  # bytes of text a new tokenizer is trained on


def prepare(preparation: Preparation, *, console: Console | None = None) -> Manifest:
    """Do what is left to do; at once if nothing is. Raises UserError for what cannot be done."""
    check(preparation)
    try:
        return _prepare(preparation, console or Console(soft_wrap=True, highlight=False))
    except BrokenPipeError:  # nobody reads what we print
        raise
    except OSError as problem:
        what = f"{problem.filename or preparation.output}: {problem.strerror or problem}"
        raise UserError(f"{what}; see to that and run the same command again, it goes on where it was") from None


def _prepare(preparation: Preparation, console: Console) -> Manifest:
    files = find_files(preparation.inputs)
    cleaning = clean.load(preparation.clean) if preparation.clean else None
    tokenizer = None if preparation.tokenizer in TRAINED else open_tokenizer(preparation.tokenizer)
    key = _key(preparation, files, tokenizer, cleaning)
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
        corpus = Corpus(lambda: cut(files, reading), total, len(files))
        record = events = None
        if cleaning:
            corpus, record, events = _clean(preparation, corpus, reading, cleaning, folder, console)
        if tokenizer is None:
            tokenizer = _trained(preparation, corpus, reading, folder, key, console)
        recipe = _recipe(preparation, reading, tokenizer, folder)
        parts, bad, size = _encode(preparation, corpus, recipe, folder, console)
        manifest = _assemble(preparation, parts, recipe, tokenizer, key, bad + (record.bad if record else 0))
        card.write(preparation, manifest, files, cleaning=cleaning, record=record, events=events)
        manifest.save(preparation.output)
    _say(preparation, manifest, size=size, seconds=time.monotonic() - began, console=console)
    return manifest


@dataclass(frozen=True)
class Corpus:
    """The pieces, as often as they are asked for; about how many bytes they stand for, and how many files."""

    pieces: Callable[[], Iterable[Piece]]
    total: int
    num_files: int


def _say(p: Preparation, manifest: Manifest, *, size: int, seconds: float, console: Console) -> None:
    for split, counts in manifest.counts.items():
        console.print(f"  {split}: {counts['documents']:,} documents, {counts['sequences']:,} sequences, {counts['tokens']:,} tokens")
    tokens = sum(counts["tokens"] for counts in manifest.counts.values())
    skipped = f", {manifest.bad_lines:,} broken lines skipped" if manifest.bad_lines else ""
    console.print(
        f"prepared {p.output}: {size / 1e6:.1f} MB of text, {tokens:,} tokens, vocabulary {manifest.vocab_size:,}{skipped}, "
        f"{seconds:.1f} s, {size / 1e6 / seconds:.1f} MB/s"
    )


def _clean(
    p: Preparation, corpus: Corpus, reading: Reading, cleaning: Cleaning, folder: Path, console: Console
) -> tuple[Corpus, Record, Iterator[dict[str, Any]]]:
    """The corpus cleaned, and what that did."""
    with Bar(console, "cleaning", corpus.total) as bar:
        pieces, record, events = sweep.sweep(
            corpus.pieces(), reading, cleaning, folder=folder, workers=p.workers, skip=p.bad_lines == "skip", bar=bar
        )
    sweep.say(record, console)
    return Corpus(lambda: pieces, corpus.total, corpus.num_files), record, events


def _key(p: Preparation, files: list[Path | str], tokenizer: Tokenizer | None, cleaning: Cleaning | None) -> str:
    """Names inputs and settings, except those that change no byte of the output."""
    settings = p.model_dump(exclude={"workers", "output", "inputs"}) | {
        "tokenizer": tokenizer.fingerprint if tokenizer else p.tokenizer,
        "clean": cleaning.fingerprint if cleaning else None,
    }
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


def _trained(p: Preparation, corpus: Corpus, reading: Reading, folder: Path, key: str, console: Console) -> Tokenizer:
    """A new tokenizer from at most SAMPLE bytes of training documents, taken evenly; kept for a restart."""
    kept = folder / f"tokenizer-{key}"
    if kept.is_dir():
        return open_tokenizer(kept)
    every = max(1, -(-corpus.total // SAMPLE))
    size = p.vocab_size or 32000

    def texts() -> Iterator[str]:
        taken = 0
        for number, piece in enumerate(corpus.pieces()):
            if number % every:
                continue
            for found in documents(piece, reading):
                if isinstance(found, BadLine):
                    if p.bad_lines == "refuse":
                        raise refuse([f"{found.where}: {found.why}"], 1)
                elif found.text.strip() and split_of(found.head, p.splits, p.seed) == 0:
                    taken += len(found.text)
                    yield found.text
            bar.advance(piece.size)
            if taken >= SAMPLE:
                return

    began = time.monotonic()
    with Bar(console, f"training {p.tokenizer[6:]} tokenizer", corpus.total // every) as bar:
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


def _encode(p: Preparation, corpus: Corpus, recipe: Recipe, folder: Path, console: Console) -> tuple[list[Path], int, int]:
    """Every piece's part, in order; how many lines were broken; bytes of text."""
    reported: list[str] = []
    seen = {"bad": 0, "bytes": 0, "documents": 0}

    def count(summary: dict, size: int) -> None:
        if summary["bad"] and p.bad_lines == "refuse":
            raise refuse(summary["reported"], summary["bad"])
        reported.extend(summary["reported"])
        for name in seen:
            seen[name] += summary[name]
        bar.advance(size)

    start = functools.partial(begin, recipe, folder)
    with Bar(console, "tokenizing", corpus.total) as bar:
        parts, reused = make_parts(corpus.pieces(), start, key=recipe.key, folder=folder, workers=p.workers, count=count)
    if reused:
        console.print(f"took over {reused} of {len(parts)} pieces from an earlier run")
    for line in sorted(reported)[:REPORTED]:
        console.print(f"  skipped {line}", highlight=False, markup=False)
    if not seen["documents"]:
        raise UserError(f"no text in {' '.join(p.inputs)}: 0 documents in {corpus.num_files} files; check the inputs and --text-key")
    return parts, seen["bad"], seen["bytes"]


def _assemble(p: Preparation, parts: list[Path], recipe: Recipe, tokenizer: Tokenizer, key: str, bad: int) -> Manifest:
    """All parts behind one another into the shards; then tokenizer and shards take their names."""
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
        return Manifest(
            key=key, tokenizer=recipe.fingerprint, vocab_size=tokenizer.vocab_size, special=tokenizer.special, counts=counts,
            sentences=recipe.sentences, bad_lines=bad, settings=settings, versions=_versions(),
        )  # fmt: skip


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"megalite": __version__} | {name: version(name) for name in ("tokenizers", "sentencepiece", "sentencex")}
