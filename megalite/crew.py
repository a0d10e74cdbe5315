"""Processes of one machine that start together, fail together and never outlive their parent.

In: how many ranks and the life each of them leads.  Out: what every rank's work returned, or one exception: `UserError` when a rank
met bad input, `RankError` with the number and traceback of the rank that failed first. A rank reports through a pipe and then waits
until all are done, so nobody takes a finished or failed neighbour for a lost one; a rank that is killed takes the others along. Knows
nothing of torch: what a rank does between its birth and its report is `launch.py`'s business.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

from megalite.errors import UserError
from megalite.log import Copy, rank_log
from megalite.signals import WISHES, pass_on

GRACE = 2.0  # seconds between asking a rank to end and ending it
LOST_PEER = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|[Tt]imed out|[Tt]imeout|NCCL|Dist(Network|Store)Error|connectFullMesh"
)
HELD = {signal.SIGINT, *WISHES}


class RankError(RuntimeError):
    """A rank failed; `report` is its traceback, or what ended it."""

    def __init__(self, rank: int, report: str):
        super().__init__(f"rank {rank} {report}")
        self.rank, self.report = rank, report


@dataclass(frozen=True)
class Failure:
    """Why a rank failed and when, on the clock that all processes of a machine share."""

    when: float
    report: str
    by_user: bool = False
    lost_peer: bool = False  # it only noticed that another one failed

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Inside the `except` of that error."""
        if isinstance(error, UserError):
            return cls(time.monotonic(), str(error), by_user=True)
        text = traceback.format_exc().rstrip()
        return cls(time.monotonic(), f"failed:\n{text}", lost_peer=bool(LOST_PEER.search(text)))


@dataclass(frozen=True)
class Link:
    """A rank's line to its parent: where it reports, and what closes when everybody may leave."""

    reports: Connection
    leave: int

    def arrive(self) -> None:
        """Tell the parent that this rank is up and about to meet the others."""
        self.reports.send_bytes(pickle.dumps(("arrived", None)))

    def answer(self, work: Callable[[], Any]) -> NoReturn:
        """Work and report; then stay, connections open, until the parent lets everybody go."""
        code = 1
        try:
            message, code = pickle.dumps(("done", work())), 0
        except BaseException as error:
            message = pickle.dumps(("failed", Failure.of(error)))
        sys.stdout.flush()
        sys.stderr.flush()
        self.reports.send_bytes(message)
        os.read(self.leave, 1)
        os._exit(code)


@dataclass
class Rank:
    """One rank, as its parent sees it."""

    number: int
    pid: int
    reports: Connection
    alive: bool = True
    arrived: bool = False
    done: bool = False
    result: Any = None
    failure: Failure | None = None
    code: int | None = None

    def take(self, kind: str, value: Any) -> None:
        """Note one report."""
        if kind == "arrived":
            self.arrived = True
        elif kind == "done":
            self.done, self.result = True, value
        else:
            self.failure = value


def run_crew(world: int, life: Callable[[int, Link], NoReturn], *, folder: Path | None, timeout: float) -> list[Any]:
    """Fork `world` ranks that lead life(rank, link); what their works returned, in the order of ranks."""
    ranks: list[Rank] = []
    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(pass_on(lambda: [rank.pid for rank in ranks if rank.alive]))
        copies = [stack.enter_context(Copy(fd, rank_log(folder, 0))) for fd in (1, 2)] if folder else []
        leave, hold = os.pipe()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)  # a rank must not be born unknown to its parent
        try:
            for number in range(world):
                ranks.append(_fork(number, life, leave=leave, hold=hold, copies=copies, folder=folder))
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return _supervise(ranks, copies, asked, folder=folder, timeout=timeout)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
            os.close(leave)
            os.close(hold)  # what the ranks wait for
            _end_all(ranks)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


# ---- in the parent ---------------------------------------------------------------------------------------------------------------------


def _fork(number: int, life: Callable[[int, Link], NoReturn], *, leave: int, hold: int, copies: list[Copy], folder: Path | None) -> Rank:
    reports, writer = Pipe(duplex=False)
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # keeps the rank's garbage collector off the objects, and so the pages, that it shares with its parent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # other threads exist (idle BLAS workers); no rank uses them
        pid = os.fork()
    if pid == 0:
        try:
            os.close(hold)
            _be_born(parent)
            _speak_into(number, copies, folder)
            life(number, Link(writer, leave))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    gc.unfreeze()
    writer.close()
    with contextlib.suppress(OSError):  # the rank does the same; whoever comes first
        os.setpgid(pid, pid)
    return Rank(number, pid, reports)


def _supervise(ranks: list[Rank], copies: list[Copy], asked: list[int], *, folder: Path | None, timeout: float) -> list[Any]:
    """Listen until all ranks are done; raise what the first failed rank has to say."""
    began = time.monotonic()
    while not all(rank.done for rank in ranks):
        _listen(ranks, copies, seconds=0.1)
        if asked and any(rank.code == -asked[0] for rank in ranks):  # it does not listen to signals, or not yet: nothing to save
            raise SystemExit(128 + asked[0])
        if any(rank.failure for rank in ranks):
            _raise_first(ranks, copies, folder)
        if time.monotonic() - began > timeout:
            _raise_missing(ranks)  # who has arrived may work as long as it takes
    return [rank.result for rank in ranks]


def _listen(ranks: list[Rank], copies: list[Copy], seconds: float) -> None:
    """Take in what ranks report and print, and who died, for at most `seconds`."""
    alive = [rank for rank in ranks if rank.alive]
    ready = wait([*(rank.reports for rank in alive), *(copy.reader for copy in copies)], timeout=seconds)
    for copy in copies:
        if copy.reader in ready:
            copy.pump()
    for rank in alive:
        if rank.reports in ready:
            with contextlib.suppress(EOFError, OSError):  # it died; seen below
                rank.take(*pickle.loads(rank.reports.recv_bytes()))
        rank.code = _reap(rank)
        if rank.code is not None and not rank.failure:
            rank.failure = Failure(time.monotonic(), _how_it_died(rank.code))


def _raise_first(ranks: list[Rank], copies: list[Copy], folder: Path | None) -> NoReturn:
    """Raise the earliest failure that is not merely the loss of a peer; a moment is left for it to come in."""
    until = time.monotonic() + 1.0
    _listen(ranks, copies, 0.02)
    while all(rank.failure.lost_peer for rank in ranks if rank.failure) and time.monotonic() < until:
        _listen(ranks, copies, 0.02)
    failures = [(rank.failure, rank.number) for rank in ranks if rank.failure]
    for failure, number in failures:
        if folder:
            with rank_log(folder, number).open("a") as log:
                log.write(f"rank {number} {failure.report}\n")
    failure, number = min(failures, key=lambda item: (item[0].lost_peer, item[0].when))
    if failure.by_user:
        raise UserError(failure.report)
    if failure.lost_peer:
        _raise_missing(ranks)
    raise RankError(number, failure.report)


def _raise_missing(ranks: list[Rank]) -> None:
    """Name the ranks that never came to the meeting point, if there are any."""
    missing = [rank.number for rank in ranks if not rank.arrived and not rank.failure]
    if missing:
        others = f"{len(ranks) - len(missing)} of {len(ranks)} ranks were there in time; missing: {', '.join(map(str, missing))}"
        raise RankError(missing[0], f"did not arrive at the meeting point: {others}")


def _reap(rank: Rank) -> int | None:
    """The exit code of a rank that has died (negative: the signal), or None."""
    pid, status = os.waitpid(rank.pid, os.WNOHANG)
    if not pid:
        return None
    rank.alive = False
    rank.reports.close()
    return os.waitstatus_to_exitcode(status)


def _how_it_died(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was ended by SIGKILL: somebody killed it, or the machine ran out of memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code} before its work was done"


def _end_all(ranks: list[Rank]) -> None:
    """Leave no rank, and no process that a rank started, behind: a moment to leave by itself or on SIGTERM, then SIGKILL."""
    if not all(rank.done for rank in ranks):
        for rank in ranks:
            _signal(rank, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while time.monotonic() < until and [rank for rank in ranks if rank.alive and _reap(rank) is None]:
        time.sleep(0.002)
    for rank in ranks:
        _signal(rank, signal.SIGKILL)
        if rank.alive:
            os.waitpid(rank.pid, 0)
            rank.reports.close()


def _signal(rank: Rank, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # nobody of its process group is left
        os.killpg(rank.pid, number)


# ---- in a rank -------------------------------------------------------------------------------------------------------------------------


def _be_born(parent: int) -> None:
    """End when the parent ends, however that ends, and leave Ctrl-C to it. Holds across an exec, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before we could ask
        os._exit(1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in WISHES:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


def _speak_into(number: int, copies: list[Copy], folder: Path | None) -> None:
    """Point file descriptors 0, 1 and 2, which native libraries use as well, away from the terminal: rank 0 speaks through the parent."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if not folder:
        return
    with rank_log(folder, number).open("ab") as log:
        for target, copy in enumerate(copies, start=1):
            os.dup2(log.fileno() if number else copy.writer, target)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  theirs for life
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
