"""Which checkpoint a run starts from, checked before any rank starts.

In: the run's config.  Out: checkpoint folders, the one to try first in front; none for a run that begins. What decides weights and samples
must not have changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.checkpoint.manifest import Damaged, read_facts
from megalite.checkpoint.retention import whole
from megalite.config import Config, parse, run_folder
from megalite.errors import UserError

PINNED = (
    "model",
    "run.seed",
    "train.global_batch",
    "data.train",
    "data.sequence",
    "data.whole_word",
    "data.mask_fraction",
    "data.document_mask",
    "task",
)


def find(config: Config, *, tokenizer: str | None = None) -> list[Path]:
    """What config.checkpoint.resume asks for: all of the run folder, the newest first, or none, or the one it names.

    `tokenizer` is the fingerprint of the one in use, where it is known. Raises UserError when that cannot be, when the checkpoint belongs
    to another model or other data, and when none of those that are there can be read.
    """
    folder, asked = run_folder(config) / "checkpoints", config.checkpoint.resume
    own = whole(folder)
    if asked == "none" and own:
        raise UserError(f"{own[-1]} exists and checkpoint.resume = none; choose another run.folder or checkpoint.resume = auto")
    if asked not in ("none", "auto"):
        path = Path(asked).resolve()
        if own and path.parent != folder.resolve():
            raise UserError(f"{folder} holds checkpoints of its own and checkpoint.resume = {asked}; choose another run.folder")
        _check_same(config, path, tokenizer)
        return [path]
    damage = None
    for path in reversed(own):
        try:
            _check_same(config, path, tokenizer)
            return list(reversed(own))
        except Damaged as error:
            damage = damage or error
    if damage:
        raise damage
    return []


def newest(config: Config) -> list[Path]:
    """The run's own checkpoints, the newest first. Raises UserError where there is none."""
    own = whole(run_folder(config) / "checkpoints")
    if not own:
        raise UserError("watch.bad_step = rewind, but there is no checkpoint to go back to yet; lower checkpoint.every")
    return list(reversed(own))


def pass_over(error: Damaged) -> str:
    """That an older checkpoint is taken for a damaged one."""
    return f"{str(error).partition('; ')[0]}; taking an older one"


def _check_same(config: Config, path: Path, tokenizer: str | None) -> None:
    facts = read_facts(path)
    theirs = parse(facts["config"], source=str(path))
    for name in PINNED[:1] if "imported" in facts else PINNED:  # an imported model has seen none of our samples
        before, now = _at(theirs, name), _at(config, name)
        if before != now:
            raise UserError(
                f"{path} was written with {name} {_show(before, now)}, this run has {_show(now, before)}; restore it or change run.folder"
            )
    before = facts.get("tokenizer")
    if tokenizer and before and tokenizer != before:
        raise UserError(
            f"{path} was written with tokenizer {before[:12]}, these shards have {tokenizer[:12]}; "
            "prepare them with the tokenizer it was trained with, or change run.folder"
        )


def _at(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _show(value: Any, other: Any) -> str:
    """A value; of a section only what differs."""
    if not hasattr(value, "model_dump") or not hasattr(other, "model_dump"):
        return f"= {value}"
    mine, theirs = value.model_dump(), other.model_dump()
    return ", ".join(f"{key} = {mine[key]}" for key in mine if mine[key] != theirs[key])
