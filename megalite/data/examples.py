"""Rows become examples: what a task's model reads of a row and what it must answer.

In: rows, a tokenizer, the kind of task.  Out: `Example`s, unpadded. BERT reads [CLS] A [SEP] B [SEP]; a GPT reads A, or A end-of-text
B, and for
the generating tasks prompt and answer in one, with labels on the answer alone. Row by row, what cannot be used is counted or refused
with its place, and what is longer than the model can read is cut and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megalite.data import chat
from megalite.data.rows import Faults, Row
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from megalite.task import COLUMNS, Task

IGNORE = -100
GENERATING = ("translate", "chat", "lm")


@dataclass(frozen=True)
class Example:
    """Token ids, and the answer: `labels` for every token, or `target`, a class or a number, for all of them."""

    ids: np.ndarray
    labels: np.ndarray | None = None
    target: float = 0.0
    second: int = 0
    """Where the second text begins; 0: there is none."""
    source: tuple[Any, ...] = ()
    """What generation is judged by: prompt and answer as text."""


@dataclass
class Examples:
    """Of one set of rows: the examples, and how many were cut."""

    found: list[Example] = field(default_factory=list)
    cut: int = 0
    faults: Faults = field(default_factory=lambda: Faults(refuse=True))


@dataclass(frozen=True)
class Encoder:
    """How rows of a task become examples."""

    task: Task
    tokenizer: Tokenizer
    family: str
    limit: int
    """Most tokens the model reads."""
    template: str | None = None
    """The tokenizer's chat template; None: the plain one of `chat.py`."""

    def encode(self, rows: Iterable[Row], faults: Faults) -> Examples:
        """Every row that is whole; raises UserError where none is."""
        found = Examples(faults=faults)
        make: Callable[[Row], list[Example]] = getattr(self, f"_{self.task.kind}")
        for row in rows:
            try:
                made = make(row)
            except _Bad as bad:
                faults.add(row.where, str(bad))
                continue
            for example in made:
                found.cut += len(example.ids) > self.limit
                found.found.append(self._shorten(example))
        if not found.found:
            said = "; ".join(f"{why} {count}" for why, count in faults.counts.items())
            raise UserError(f"no row is left ({said or 'the files hold none'}); see to the columns, or to the rows")
        return found

    def _shorten(self, example: Example) -> Example:
        """Cut at the end; of a pair the longer text first, as BERT was."""
        surplus = len(example.ids) - self.limit
        if surplus <= 0:
            return example
        if self.family == "bert" and example.labels is None:
            end = example.ids[-1:]
            if not example.second:
                return Example(np.concatenate((example.ids[: self.limit - 1], end)), target=example.target)
            first, second = example.ids[: example.second - 1], example.ids[example.second : -1]
            room = self.limit - 2
            keep = min(len(first), max(room - len(second), room // 2))
            first, second = first[:keep], second[: room - keep]
            ids = np.concatenate((first, end, second, end))
            return Example(ids, target=example.target, second=len(first) + 1)
        ids = example.ids[: self.limit]
        return Example(ids, None if example.labels is None else example.labels[: self.limit], example.target, 0, example.source)

    def _ids(self, text: Any) -> np.ndarray:
        if not isinstance(text, str):
            raise _Bad(f"{type(text).__name__} instead of text")
        if not text.strip():
            raise _Bad("empty")
        found = self.tokenizer.encode_batch([text])[0]
        if not len(found):
            raise _Bad("no token")
        return found.astype(np.int64)

    def _texts(self, values: Sequence[Any]) -> tuple[np.ndarray, int]:
        """One or two texts as a model of this family reads them, and where the second begins."""
        special, parts = self.tokenizer.special, [self._ids(value) for value in values]
        if self.family == "bert":
            sep = np.array([special["sep"]])
            ids = np.concatenate([np.array([special["cls"]]), *(part for ids in parts for part in (ids, sep))])
            return ids, len(parts[0]) + 2 if len(parts) > 1 else 0
        between = np.array([special["eos"]])
        return np.concatenate([parts[0], *(part for ids in parts[1:] for part in (between, ids))]), 0

    def _classify(self, row: Row) -> list[Example]:
        *texts, label = row.values
        if str(label).strip() not in self.task.labels:
            raise _Bad(f"label {str(label)!r} is none of those of the training rows" if str(label).strip() else "empty label")
        ids, second = self._texts(texts)
        return [Example(ids, target=self.task.labels.index(str(label).strip()), second=second)]

    def _regress(self, row: Row) -> list[Example]:
        *texts, label = row.values
        try:
            value = float(label)
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise _Bad(f"label {str(label)!r} is no number")
        ids, second = self._texts(texts)
        return [Example(ids, target=value, second=second)]

    def _tag(self, row: Row) -> list[Example]:
        words, tags = (value.split(" ") if isinstance(value, str) else value for value in row.values)
        if not isinstance(words, list) or not isinstance(tags, list):
            raise _Bad("tokens and tags are lists, or texts with spaces between")
        if len(words) != len(tags) or not words:
            raise _Bad(f"{len(words)} tokens and {len(tags)} tags" if words else "empty")
        if unknown := next((tag for tag in tags if tag not in self.task.labels), None):
            raise _Bad(f"tag {unknown!r} is none of those of the training rows")
        spaced = [word if self.family == "bert" or not n else f" {word}" for n, word in enumerate(words)]
        pieces = self.tokenizer.encode_batch(spaced)
        ids: list[int] = []
        labels: list[int] = []
        for piece, tag in zip(pieces, tags, strict=True):
            ids += piece.tolist()
            labels += [self.task.labels.index(tag), *[IGNORE] * (len(piece) - 1)][: len(piece)]
        if self.family == "bert":
            special = self.tokenizer.special
            ids, labels = [special["cls"], *ids[: self.limit - 2], special["sep"]], [IGNORE, *labels[: self.limit - 2], IGNORE]
        return [Example(np.array(ids), np.array(labels))]

    def _translate(self, row: Row) -> list[Example]:
        source, target = row.values
        self._ids(source)
        prompt = self._ids(self.task.prompt.format(source=source))
        return [self._answered([(prompt, False), (self._ids(target), True)], source=(source, target))]

    def _chat(self, row: Row) -> list[Example]:
        try:
            pieces = chat.encode(row.values[0], self.tokenizer, template=self.template)
        except chat.NoChat as problem:
            raise _Bad(str(problem)) from None
        return [self._answered(pieces, end=False)]

    def _lm(self, row: Row) -> list[Example]:
        ids = np.append(self._ids(row.values[0]), self.tokenizer.special["eos"])
        return [self._shift(ids[at : at + self.limit + 1], ids[at + 1 : at + self.limit + 1]) for at in range(0, len(ids) - 1, self.limit)]

    def _answered(self, pieces: list[tuple[np.ndarray, bool]], *, end: bool = True, source: tuple[Any, ...] = ()) -> Example:
        """Labels where a piece is to be learned; the token before a piece is what predicts its first."""
        if end:
            pieces = [*pieces, (np.array([self.tokenizer.special["eos"]]), True)]
        ids = np.concatenate([piece for piece, _ in pieces]).astype(np.int64)
        learned = np.concatenate([np.full(len(piece), learn) for piece, learn in pieces])
        return self._shift(ids, np.where(learned, ids, IGNORE)[1:], source=source)

    def _shift(self, ids: np.ndarray, labels: np.ndarray, *, source: tuple[Any, ...] = ()) -> Example:
        return Example(ids[:-1], labels, source=source)


class _Bad(Exception):
    """Why a row cannot be used."""


def columns_of(task: Task) -> tuple[str, ...]:
    """What to read. Raises UserError for a number of columns that the task cannot do with."""
    columns = task.columns or COLUMNS[task.kind]
    allowed = (2, 3) if task.kind in ("classify", "regress") else (len(COLUMNS[task.kind]),)
    if len(columns) not in allowed:
        wanted = " or ".join(map(str, allowed))
        raise UserError(f"--columns {' '.join(columns)} names {len(columns)}, {task.kind} reads {wanted}: {' '.join(COLUMNS[task.kind])}")
    return columns


def labels_of(rows: Iterable[Row], task: Task) -> tuple[str, ...]:
    """The labels that occur, sorted; numbers in their own order."""
    seen: set[str] = set()
    for row in rows:
        value = row.values[-1]
        if task.kind == "tag":
            seen.update(value.split(" ") if isinstance(value, str) else map(str, value if isinstance(value, list) else []))
        else:
            seen.add(str(value).strip())
    seen.discard("")
    return tuple(sorted(seen, key=lambda label: (not label.lstrip("-").isdigit(), int(label) if label.lstrip("-").isdigit() else 0, label)))
