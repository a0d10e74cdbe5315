"""Which checkpoint a run starts from, checked before any rank starts.

In: the run's config.  Out: a checkpoint folder, or None for a run that begins. What decides weights and samples must not have changed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalite.checkpoint.store import read_facts, whole
from megalite.config import Config, parse, run_folder
from megalite.errors import UserError

PINNED = ("model", "run.seed", "train.global_batch", "data.train", "data.sequence", "data.whole_word", "data.mask_fraction")


def find(config: Config) -> Path | None:
    """What config.checkpoint.resume asks for: the newest of the run folder, none, or the one it names.

    Raises UserError when that cannot be or when it belongs to another model or other data.
    """
    folder, asked = run_folder(config) / "checkpoints", config.checkpoint.resume
    own = whole(folder)
    if asked == "none" and own:
        raise UserError(f"{own[-1]} exists and checkpoint.resume = none; choose another run.folder or checkpoint.resume = auto")
    if asked in ("none", "auto"):
        path = own[-1] if own else None
    else:
        path = Path(asked).resolve()
        if own and path.parent != folder.resolve():
            raise UserError(f"{folder} holds checkpoints of its own and checkpoint.resume = {asked}; choose another run.folder")
    if path is not None:
        _check_same(config, path)
    return path


def _check_same(config: Config, path: Path) -> None:
    theirs = parse(read_facts(path)["config"], source=str(path))
    for name in PINNED:
        before, now = _at(theirs, name), _at(config, name)
        if before != now:
            raise UserError(
                f"{path} was written with {name} {_show(before, now)}, this run has {_show(now, before)}; restore it or change run.folder"
            )


def _at(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _show(value: Any, other: Any) -> str:
    """A value; of a section only what differs."""
    if not hasattr(value, "model_dump"):
        return f"= {value}"
    mine, theirs = value.model_dump(), other.model_dump()
    return ", ".join(f"{key} = {mine[key]}" for key in mine if mine[key] != theirs[key])
