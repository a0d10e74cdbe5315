"""Signals that ask a run to end in good order: SIGTERM, and SIGUSR1, which clusters send some time before they end a job.

In: the processes that can.  Out: what came. `crew.py` passes them on to its ranks, where `observe/watch.py` hears them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence

WISHES = (signal.SIGTERM, signal.SIGUSR1)


def deafen() -> None:
    """Ignore them in this process: it serves a rank that hears them, and SLURM signals every process of a step."""
    for number in WISHES:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def pass_on(processes: Callable[[], Sequence[int]]) -> Iterator[list[int]]:
    """Send what comes on to `processes()`, which may end in good order; yields what came. Asked again, or without them, this one ends.

    Somebody else's handler stays.
    """
    asked: list[int] = []

    def hear(number: int, _: object) -> None:
        there = processes()
        if asked or not there:
            raise SystemExit(128 + number)
        asked.append(number)
        for process in there:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    ours = [number for number in WISHES if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for number in ours:
        signal.signal(number, hear)
    try:
        yield asked
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
