"""Files in a run's control/ that steer it while it runs, without ssh: `stop`, `save` and `log-level`.

In: the folder, as rank 0 finds it after a step.  Out: orders, which `watch.py` has all ranks agree on. `touch control/stop` saves and ends
the run (nobody starts it again by itself), `touch control/save` saves and goes on, `echo DEBUG > control/log-level` lets every rank's log
say what it is about to do. `stop` and `save` are taken away when they were read. The folder is looked at once a second at most, so that
a file system over a network is not asked at every step.
"""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER, STOP, SAVE, LEVEL = "control", "control/stop", "control/save", "control/log-level"
PAUSE = 1.0  # seconds
LEVELS = {name: getattr(logging, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR")}
LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Orders:
    """level: a level of `logging` to set, 0: none."""

    stop: bool = False
    save: bool = False
    level: int = 0


class Switch:
    """Rank 0's eye on a run's control/."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.looked, self.level = folder, 0.0, "INFO"
        with contextlib.suppress(OSError):  # whoever can save can do this; a disk that is full now may not be later
            (folder / FOLDER).mkdir(parents=True, exist_ok=True)

    def read(self) -> Orders:
        """What was asked since the last time."""
        now = time.monotonic()
        if now - self.looked < PAUSE:
            return Orders()
        self.looked = now
        try:
            names = {path.name for path in (self.folder / FOLDER).iterdir()}
        except OSError:  # not there, or the disk does not answer: no reason to end a run
            return Orders()
        return Orders(stop=self._take(STOP, names), save=self._take(SAVE, names), level=self._level(names))

    def _take(self, name: str, names: set[str]) -> bool:
        if Path(name).name not in names:
            return False
        with contextlib.suppress(OSError):  # it stays, and is read again after the next step
            (self.folder / name).unlink()
        LOG.warning("%s was there", name)
        return True

    def _level(self, names: set[str]) -> int:
        """The level to set, where another one is asked for than is set; INFO where the file is gone."""
        asked = "INFO"
        if Path(LEVEL).name in names:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                asked = (self.folder / LEVEL).read_text().strip().upper()
        if asked == self.level:
            return 0
        self.level = asked
        if asked not in LEVELS:
            LOG.warning("%s says %r, but a level is one of %s", LEVEL, asked, ", ".join(LEVELS))
            return 0
        return LEVELS[asked]
