"""The section of a run's config that makes it a fine-tuning: what for, from where, on which rows, judged how.

In: flags and a run file.  Out: a `Task`, frozen like every section.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveFloat

from megalite.upkeep import Section

COLUMNS = {
    "classify": ("text", "label"),
    "regress": ("text", "label"),
    "tag": ("tokens", "tags"),
    "translate": ("source", "target"),
    "chat": ("messages",),
    "lm": ("text",),
}
"""What each task reads where no columns are named; classify and regress read two texts where three columns are."""
SCORES = {"classify": "macro_f1", "regress": "spearman", "tag": "f1", "translate": "loss", "chat": "loss", "lm": "loss"}
"""By what each task's best checkpoint is chosen; of a loss the lowest."""


class Task(Section):
    kind: Literal["classify", "tag", "regress", "translate", "chat", "lm"]
    """classify: a label for one or two texts; tag: one for each word; regress: a number; translate: a text for a text; chat: the
    assistant's turns of a conversation; lm: text as it is."""
    start: str
    """What to begin from: a checkpoint, a run folder, or a Hugging Face folder or name."""
    train: tuple[str, ...]
    """Rows to train on: .tsv .csv .jsonl .parquet, or hf:NAME[:CONFIG][:SPLIT]."""
    valid: tuple[str, ...] = ()
    """Rows to judge by while training; left out: no validation."""
    columns: tuple[str, ...] = ()
    """Columns to read, in the task's order: classify and regress TEXT [TEXT] LABEL, tag TOKENS TAGS, translate SOURCE TARGET, chat
    MESSAGES, lm TEXT; left out: those names in lower case, label for LABEL."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What to do about rows that are empty, broken or of a label that training does not have; skipped ones are counted."""
    labels: tuple[str, ...] = ()
    """Names of the labels in their order; left out: those of the training rows, sorted."""
    prompt: str = "{source}\n"
    """translate: what stands before the translation; {source} is the text."""
    epochs: PositiveFloat = 3.0
    """Times the training rows are read; train.steps, where it is given, counts instead."""
    patience: NonNegativeInt = 0
    """Validations in a row without a better score after which training ends; 0: it never ends early."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a class counts in inverse proportion to its rows (classify)."""
    group_lengths: bool = True
    """Put texts of like length together, so that little is padding."""
