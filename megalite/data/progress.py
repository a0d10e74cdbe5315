"""How far a long piece of work has come, shown on the console.

In: bytes done, as they are done. Out: a bar on a terminal, a plain line now and then elsewhere.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

QUIET = 5.0  # seconds between two plain lines


class Bar:
    """A bar on a terminal, a plain line now and then elsewhere."""

    def __init__(self, console: Console, title: str, total: int) -> None:
        self._console, self._title, self._total, self._done, self._said = console, title, total, 0, time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._began = time.monotonic()

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total or None, rate="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, size: int) -> None:
        self._done += size
        now = time.monotonic()
        rate = f"{self._done / 1e6 / max(now - self._began, 1e-3):.1f} MB/s"
        if self._progress:
            self._progress.update(self._task, completed=self._done, rate=rate)
        elif now - self._said >= QUIET:
            share = f" of {self._total / 1e6:.1f} MB ({100 * self._done // self._total} %)" if self._total else ""
            self._console.print(f"{self._title}: {self._done / 1e6:.1f} MB{share}, {rate}", highlight=False)
            self._said = now
