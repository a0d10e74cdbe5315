"""The rows of a fine-tuning, read and encoded: training rows decide the labels, held-out rows must keep to them.

In: a task, a tokenizer, the family of the model.  Out: the task with its labels, and examples. Raises UserError for what the model
cannot do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalite.data import chat
from megalite.data.examples import GENERATING, Encoder, Examples, columns_of, labels_of
from megalite.data.rows import Faults, Row, read_rows
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from megalite.task import Task


def check_family(task: Task, family: str, tokenizer: Tokenizer) -> None:
    """Whether a model of this family can do the task, and its tokenizer has what that takes."""
    if family == "bert" and task.kind in GENERATING:
        raise UserError(f"task {task.kind} writes text, which a BERT does not; begin from a GPT")
    needed = ("cls", "sep") if family == "bert" else ("eos",)
    missing = [role for role in needed if role not in tokenizer.special]
    if missing:
        raise UserError(f"the tokenizer has no {', '.join(missing)} token, which task {task.kind} needs; begin from another model")
    if task.kind == "translate" and "{source}" not in task.prompt:
        raise UserError(f"task.prompt = {task.prompt!r} has no {{source}}, where the text goes; write it there")
    if task.class_weights == "balanced" and task.kind != "classify":
        raise UserError(f"task.class_weights = balanced is for classify, this is {task.kind}; leave it out")


def read_lessons(task: Task, tokenizer: Tokenizer, *, family: str, limit: int, folder: str) -> tuple[Task, Examples, Examples | None]:
    """(the task with its labels, training examples, validation examples). `folder`: of the tokenizer, for its chat template."""
    columns = columns_of(task)
    faults = Faults(refuse=task.bad_rows == "refuse")
    rows = list(read_rows(task.train, columns, faults))
    if task.kind in ("classify", "tag"):
        task = task.model_copy(update={"labels": task.labels or labels_of(rows, task)})
        if len(task.labels) < 2:
            raise UserError(f"the training rows have the label {', '.join(task.labels) or 'none'} alone; see to the columns: {columns}")
    train = encode(rows, task, tokenizer, family=family, limit=limit, folder=folder, faults=faults)
    if not task.valid:
        return task, train, None
    held = Faults(refuse=task.bad_rows == "refuse")
    rows = list(read_rows(task.valid, columns, held))
    return task, train, encode(rows, task, tokenizer, family=family, limit=limit, folder=folder, faults=held)


def encode(rows: Sequence[Row], task: Task, tokenizer: Tokenizer, *, family: str, limit: int, folder: str, faults: Faults) -> Examples:
    """Examples of these rows, of labels that are known."""
    template = chat.find_template(folder) if Path(folder).is_dir() else None
    return Encoder(task, tokenizer, family, limit, template).encode(rows, faults)
