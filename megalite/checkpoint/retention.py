"""Which checkpoints of a run are there, and which of them stay.

In: a run's checkpoints/ and its settings: the newest `keep`, every `keep_every`-th step, the best.  Out: folders; a checkpoint that goes
is renamed first, so that no moment shows half of one under the name of a whole one.
"""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from megalite.checkpoint import manifest
from megalite.checkpoint.storage import sync
from megalite.config import Checkpoint
from megalite.errors import UserError

GOING = ".going"
LOG = logging.getLogger(__name__)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def whole(folder: Path) -> list[Path]:
    """Every checkpoint of a run's checkpoints/ that was written to its end, in the order of steps."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit() and (path / manifest.FILE).is_file()]
    return sorted(found, key=step_of)


def prune(folder: Path, *, newest: Path, settings: Checkpoint) -> None:
    """Forget what need not be kept, and what a killed save or prune left. `newest` was just written and stays.

    A disk that does not let go of something is told of, and no reason to stop.
    """
    try:
        for old in stale(folder, newest=newest, settings=settings):
            remove(old)
        for left in [*folder.glob(f"step-*{GOING}"), *folder.glob("step-*.partial")]:
            shutil.rmtree(left)
    except OSError as error:
        LOG.warning("an old checkpoint could not be removed: %s", error)


def stale(folder: Path, *, newest: Path, settings: Checkpoint) -> list[Path]:
    """What may go: all but the newest `keep` (`newest` among them, whatever its number), every `keep_every`-th step, and the best."""
    others = [path for path in whole(folder) if path != newest]  # of a run that resumed below them, newer ones too
    kept = set(others[max(0, len(others) + 1 - settings.keep) :])
    if settings.keep_every:
        kept |= {path for path in others if step_of(path) % settings.keep_every == 0}
    if settings.keep_best:
        kept.add(min([*others, newest], key=rank_of))
    return [path for path in others if path not in kept]


def loss_of(path: Path) -> float:
    """The validation loss measured at that very step; infinite where none was."""
    try:
        facts = manifest.read_facts(path)
    except UserError:
        return math.inf
    return sum(facts["valid"].values()) if facts.get("valid") and facts.get("valid_step") == facts["step"] else math.inf


def rank_of(path: Path) -> float:
    """Lower is better: a task's score at that very step, negative, where it was fine-tuned; else the validation loss."""
    try:
        facts = manifest.read_facts(path)
    except UserError:
        return math.inf
    scored = facts.get("score") is not None and facts.get("valid_step") == facts["step"]
    return -facts["score"] if scored else loss_of(path)


def remove(path: Path) -> None:
    """Take a folder away; the name goes at once."""
    if path.exists():
        going = path.with_name(path.name + GOING)
        shutil.rmtree(going, ignore_errors=True)
        path.rename(going)
        sync(path.parent)
        shutil.rmtree(going)


def link_latest(folder: Path, name: str) -> None:
    """Point `latest` at a checkpoint, in one step."""
    fresh = folder / "latest.partial"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(name)
    fresh.replace(folder / "latest")
    sync(folder)
