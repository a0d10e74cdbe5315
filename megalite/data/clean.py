"""The cleaning stage of `megalite prepare`: what is repaired, taken out or hidden before a text becomes tokens, and what came of it.

In: pieces of text and a `Cleaning`, each step of which may be left out.  Out: the same pieces cleaned, as part files that `documents.py`
reads, and a `Record` of counts. The order is: Unicode, boilerplate lines, language, quality, repetition, identity, duplicates. Workers do
all but the last; like everything in OUTPUT.parts, what they finished survives a kill.

A text file longer than a piece comes in several; lines are cleaned and things hidden in each, but it is judged by no rule about a whole
document.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError, field_validator

from megalite.config import explain
from megalite.data.documents import BadLine, documents
from megalite.data.duplicates import Duplicates, sketch
from megalite.data.identity import Identity, Veil
from megalite.data.inputs import Piece, Reading
from megalite.data.parts import pack, part_path, write_part
from megalite.data.quality import (
    Languages,
    Lines,
    Quality,
    Repetition,
    judge_language,
    judge_quality,
    judge_repetition,
    strip_lines,
)
from megalite.errors import UserError
from megalite.upkeep import Section

REPORTED = 10  # broken lines a part remembers; all are counted
Step = Callable[[str], tuple[str | None, Counter[str]]]
"""A text -> the text that goes on, or None; and what was found, by name."""


class Cleaning(Section):
    """Every step is off unless it is named; `true` takes a step's defaults."""

    unicode: bool = False
    """Repair mojibake, HTML entities, control characters and line ends, and compose letters (NFC), by ftfy."""
    lines: Lines | None = None
    """Take boilerplate lines out."""
    languages: Languages | None = None
    """Keep documents in some languages."""
    quality: Quality | None = None
    """Keep what passes the rules of Gopher and C4."""
    repetition: Repetition | None = None
    """Keep what repeats itself little."""
    identity: Identity | None = None
    """Hide personal and secret things."""
    duplicates: Duplicates | None = None
    """Keep one of several documents that say the same."""

    @field_validator("lines", "quality", "repetition", "identity", "duplicates", mode="before")
    @classmethod
    def _take_defaults(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @property
    def fingerprint(self) -> str:
        """Names the settings and the secret key, without giving it away."""
        secret = self.identity.read_key() if self.identity else None
        return hashlib.blake2b(self.model_dump_json().encode(), digest_size=16, key=hashlib.sha256(secret or b"").digest()).hexdigest()


def load(path: str) -> Cleaning:
    """The settings in a YAML file. Raises UserError for what is no setting."""
    try:
        document = yaml.safe_load(Path(path).read_text("utf-8"))
    except OSError as problem:
        raise UserError(f"--clean {path} cannot be read ({problem.strerror}); give a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(f"--clean {path} is no YAML: {' '.join(str(problem).split())}") from None
    try:
        found = Cleaning.model_validate(document or {})
    except ValidationError as error:
        raise UserError(f"--clean {path}: {explain(error, Cleaning)}") from None
    if found == Cleaning():
        raise UserError(f"--clean {path} names no step; the steps are {', '.join(Cleaning.model_fields)}")
    return found


def steps_of(cleaning: Cleaning) -> dict[str, tuple[Step, bool]]:
    """The steps a worker does, in order, by name; and whether a step judges whole documents alone."""
    found: dict[str, tuple[Step, bool]] = {}
    if cleaning.unicode:
        found["unicode"] = _repair, False
    if (lines := cleaning.lines) is not None:
        found["lines"] = lambda text: _stripped(text, lines), False
    for name, judge in (("languages", judge_language), ("quality", judge_quality), ("repetition", judge_repetition)):
        if (rules := getattr(cleaning, name)) is not None:
            found[name] = _judging(judge, rules), True
    if cleaning.identity is not None:
        found["identity"] = Veil(cleaning.identity).hide, False
    return found


def _judging(judge: Callable[[str, Any], str | None], rules: Any) -> Step:
    def step(text: str) -> tuple[str | None, Counter[str]]:
        reason = judge(text, rules)
        return (text, Counter()) if reason is None else (None, Counter([reason]))

    return step


def _stripped(text: str, rules: Lines) -> tuple[str, Counter[str]]:
    kept, gone = strip_lines(text, rules)
    return kept, Counter({"lines": gone}) if gone else Counter()


def _repair(text: str) -> tuple[str, Counter[str]]:
    """Full-width letters and quotes are text in Chinese and in typography, so those are left as they are."""
    import ftfy

    if text.isascii() and text.isprintable() and "&" not in text:
        return text, Counter()
    mended = ftfy.fix_text(text, uncurl_quotes=False, fix_character_width=False, fix_latin_ligatures=False, explain=False)
    return mended, Counter(["repaired"]) if mended != text else Counter()


@dataclass
class Tally:
    """What one step did: documents and characters behind it, documents it changed, what it found."""

    documents: int = 0
    characters: int = 0
    changed: int = 0
    found: Counter[str] = field(default_factory=Counter)

    def add(self, other: dict[str, Any]) -> None:
        self.documents += other["documents"]
        self.characters += other["characters"]
        self.changed += other["changed"]
        self.found.update(other["found"])

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "characters": self.characters,
            "changed": self.changed,
            "found": dict(self.found.most_common()),
        }


def clean_part(piece: Piece, reading: Reading, steps: dict[str, tuple[Step, bool]], duplicates: Duplicates | None) -> dict[str, Any]:
    """All that a piece gives: its texts and what they are, what happened to which, sketches of the whole ones, and a summary."""
    tallies = {name: Tally() for name in ("read", *steps)}
    rows: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"bad": 0, "reported": [], "bytes": 0}
    for found in documents(piece, reading):
        if isinstance(found, BadLine):
            summary["bad"] += 1
            if len(summary["reported"]) < REPORTED:
                summary["reported"].append(f"{found.where}: {found.why}")
            continue
        text: str | None = found.text
        whole = found.first and found.last
        summary["bytes"] += len(found.text)
        if whole and not found.text.strip():
            continue
        _count(tallies["read"], found.text, last=found.last)
        for name, (step, judges) in steps.items():
            if judges and not whole:
                _count(tallies[name], text, last=found.last)
                continue
            after, seen = step(text)
            if whole and after is not None and not after.strip():
                after, seen = None, seen + Counter(["nothing left"])
            if seen:
                tallies[name].found.update(seen)
                tallies[name].changed += 1
                events.append({"where": found.where, "step": name, "removed": after is None, "found": dict(seen)})
            text = after
            if text is None:
                break
            _count(tallies[name], text, last=found.last)
        if text is not None:
            head = "" if whole else hashlib.blake2b(found.head, digest_size=16).hexdigest()
            rows.append({"text": text, "where": found.where, "first": found.first, "last": found.last, "head": head})
    summary["steps"] = {name: tally.summary() for name, tally in tallies.items()}
    summary["whole"] = sum(row["first"] and row["last"] for row in rows)
    part = {"summary": np.frombuffer(json.dumps(summary).encode(), np.uint8), "rows": pack(rows), "events": pack(events)}
    if duplicates is not None:
        part |= sketch([row["text"] for row in rows if row["first"] and row["last"]], duplicates)
    return part


def _count(tally: Tally, text: str, *, last: bool) -> None:
    tally.documents += last
    tally.characters += len(text)


def begin(reading: Reading, cleaning: Cleaning, key: str, folder: Path) -> Callable[[Piece], dict[str, Any]]:
    """What a worker does for every piece: write its part, return its summary."""
    steps = steps_of(cleaning)

    def work(piece: Piece) -> dict[str, Any]:
        part = clean_part(piece, reading, steps, cleaning.duplicates)
        write_part(part_path(folder, piece, key), part)
        return json.loads(bytes(part["summary"]))

    return work
