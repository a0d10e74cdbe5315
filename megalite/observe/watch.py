"""Signs of life, and signals: whether all ranks are alive, and whether somebody wants the run to end in good order.

In: what this rank is doing.  Out: what any rank was asked by a signal (SIGTERM or SIGUSR1), or rank 0 by a file of the run folder
(`switch.py`), known to all after the same step; and an end, with the name of the rank, when one shows no sign of life. Every rank's thread
writes a beat into a store that rank 0 keeps and reads that of the next rank, so the work of each does not grow with their number. A rank
that was stopped, or whose machine is gone, stops beating; one that waits for others does not. The interpreter's lock is free while a rank
waits in a collective, so its thread beats on.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from megalite import launch
from megalite.observe.switch import STOP, Switch
from megalite.signals import WISHES
from megalite.upkeep import Watch as Settings

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """What all ranks do after this step: end (the name of the signal, or file, that asked for it), or save."""

    end: str | None
    save: bool


class Watch:
    """Use as `with Watch(settings, folder) as watch:` on every rank, in its main thread; `folder` is the run's."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.patience, self.rank, self.world = float(settings.hang), dist.get_rank(), dist.get_world_size()
        self.operation, self.asked = "start", 0
        self.neighbour, self.heard = (self.rank + 1) % self.world, ""
        self.quiet = {"neighbour": 0.0, "store": 0.0}  # seconds since the next rank's beat changed, since rank 0's store answered
        self.over = threading.Event()
        self.switch = Switch(folder) if self.rank == 0 else None
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)
        self.group = group

    def __enter__(self) -> Watch:
        self.before = {number: signal.signal(number, self._note) for number in WISHES}
        if self.patience and self.world > 1:
            place: list[int] = [0]
            host = launch.meeting_host()
            if self.rank == 0:
                self.keeper = TCPStore(host, 0, is_master=True, wait_for_workers=False)
                place = [self.keeper.port]
            dist.broadcast_object_list(place, group=self.group)
            store = TCPStore(host, place[0], is_master=False, wait_for_workers=False, timeout=timedelta(seconds=self.patience))
            store.set(f"beat/{self.rank}", "0 start")
            dist.barrier(self.group)
            for work in (functools.partial(self._beat, store), self._oversee):
                threading.Thread(target=work, name="watch", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            dist.barrier(self.group)  # nobody stops beating while others still listen
        self.over.set()
        for number, handler in self.before.items():  # who asks again while this rank leaves must not end it badly
            signal.signal(number, signal.SIG_IGN if self.asked else handler)

    def enter(self, operation: str) -> None:
        """Say what this rank does from now on."""
        self.operation = operation
        LOG.debug("%s", operation)

    def heed(self) -> Asked:
        """What some rank was asked by a signal, or rank 0 by a file. Called by all ranks together, once a step."""
        orders = self.switch.read() if self.switch else None
        mine = [self.asked, *((orders.stop, orders.save, orders.level) if orders else (0, 0, 0))]
        asked = torch.tensor(mine, dtype=torch.int64)
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.group)
        number, stop, save, level = asked.tolist()
        if level:
            logging.getLogger("megalite").setLevel(level)
        return Asked(STOP if stop else signal.Signals(number).name if number else None, bool(save))

    def _note(self, number: int, _: FrameType | None) -> None:
        self.asked = number

    def _beat(self, store: TCPStore) -> None:
        """Beat, and note what the next rank's beat was. Where rank 0 is stopped this waits for its store for good, timeout or not."""
        count = 0
        with contextlib.suppress(RuntimeError, dist.DistError):  # the store is gone: `_oversee` hears no answer any more
            while not self.over.wait(min(self.patience / 4, 5.0)):
                count += 1
                store.set(f"beat/{self.rank}", f"{count} {self.operation}")
                heard = store.get(f"beat/{self.neighbour}").decode()
                self.quiet["store"] = 0.0
                if heard != self.heard:
                    self.heard, self.quiet["neighbour"] = heard, 0.0

    def _oversee(self) -> None:
        """Count the seconds of silence, and end this rank when they are too many. One that was stopped itself has not been listening."""
        before = time.monotonic()
        while not self.over.wait(0.2):
            now = time.monotonic()
            for who in self.quiet:
                self.quiet[who] += min(now - before, 1.0)
            before = now
            if self.over.is_set():
                return
            if self.quiet["store"] > self.patience:
                self._end(0)
            if self.quiet["neighbour"] > self.patience and self.quiet["store"] < self.patience / 2:  # else it is rank 0 that nobody hears
                self._end(self.neighbour)

    def _end(self, silent: int) -> None:
        doing = self.heard.partition(" ")[2] if silent == self.neighbour else ""
        last = f"; it was in: {doing}" if doing else ""
        mine = f"rank {self.rank} waits in: {self.operation}"
        launch.end_rank(
            f"sees no sign of life of rank {silent} for {self.patience:g} s (watch.hang){last}; {mine}. "
            f"Rank {silent} hangs, was stopped, or its machine is gone; run again: the run resumes from its last checkpoint",
            culprit=silent,
        )
