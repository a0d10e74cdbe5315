"""One voice: what a rank says on the console and keeps in its log.

In: the standard logger `megalite` and its children, and whatever native libraries write to file descriptors 1 and 2.  Out: plain lines
on the console (coloured where it is a terminal) from rank 0 alone, and folder/logs/rank-R.log from every rank. Any part of megalite
says something by `logging.getLogger(__name__).info(...)`; nothing here is kept between calls.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import tty
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

from megalite.signals import deafen

CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]")
FOREIGN = ("DeepSpeed", "torch", "torch.distributed", "filelock", "fsspec", "asyncio", "tensorboard")


class Voice(logging.StreamHandler):
    """Writes to whatever sys.stdout is at that moment, so that a live progress bar can step aside for a line."""

    def __init__(self, rank: int):
        logging.Handler.__init__(self)
        self.prefix = f"[rank {rank}] " if rank else ""

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return self.prefix + level + super().format(record)


def open_voice(rank: int, *, own_log: bool = False) -> None:
    """Let the logger `megalite` speak for this rank; ranks that share the console with rank 0 are held to warnings."""
    logger = logging.getLogger("megalite")
    logger.handlers = [Voice(rank)]
    logger.setLevel(logging.INFO if rank == 0 or own_log else logging.WARNING)
    logger.propagate = False


def open_console() -> Console:
    """A rich console on standard output; without a terminal its lines are plain and never wrapped."""
    if sys.stdout.isatty():
        return Console(highlight=False, soft_wrap=True)
    return Console(highlight=False, soft_wrap=True, no_color=True, width=10_000)


def quiet_foreign() -> None:
    """Silence, below WARNING, the libraries that greet every start; their warnings stay, but for torch's notices to DeepSpeed's authors."""
    for name in FOREIGN:
        logging.getLogger(name).setLevel(logging.WARNING)
    for handler in logging.getLogger("DeepSpeed").handlers:
        handler.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|deepspeed")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch|deepspeed|tensorboard")


def rank_log(folder: Path, rank: int) -> Path:
    """Where this rank's output is kept; the folder is made."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder / f"logs/rank-{rank}.log"


class Copy:
    """One of rank 0's two streams on its way through the parent: to the console as it is, to the log as plain lines.

    The rank writes to `writer`, a pseudo-terminal if the console is a terminal, so that progress bars stay alive. Whoever supervises
    calls `pump` when `reader` has something to say; what a rank wrote before it was killed is therefore never lost.
    """

    def __init__(self, console: int, path: Path):
        self.console, self.terminal = console, os.isatty(console)
        self.reader, self.writer = pty.openpty() if self.terminal else os.pipe()
        self.log = path.open("ab", buffering=0)
        self.rest = b""
        self.size = None
        os.set_blocking(self.reader, False)
        if self.terminal:
            tty.setraw(self.writer)  # the console itself turns newlines into carriage returns
            self._follow_size()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.drain()
        if self.rest:
            self.log.write(plain(self.rest) + b"\n")
        self.log.close()
        os.close(self.reader)
        os.close(self.writer)

    def pump(self) -> bool:
        """Pass on what there is; whether there was anything."""
        try:
            said = os.read(self.reader, 1 << 16)
        except OSError:  # nothing yet, or the other side of a pseudo-terminal is gone
            return False
        self._follow_size()
        left = said
        while left:
            left = left[os.write(self.console, left) :]
        *lines, self.rest = (self.rest + said).split(b"\n")
        self.log.write(b"".join(plain(line) + b"\n" for line in lines))
        return bool(said)

    def drain(self) -> None:
        while self.pump():
            pass

    def _follow_size(self) -> None:
        if self.terminal and (size := termios.tcgetwinsize(self.console)) != self.size:
            termios.tcsetwinsize(self.writer, size)
            self.size = size


def plain(line: bytes) -> bytes:
    """What a terminal would show of a line in the end: no colours, and nothing that a progress bar has overwritten."""
    return CONTROL.sub(b"", line.rstrip(b"\r").rpartition(b"\r")[2])


@contextlib.contextmanager
def own_log(path: Path, *, show: bool) -> Iterator[TextIO]:
    """Send file descriptors 1 and 2 to `path`, appended, and with `show` to the console as well; yields the console's stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    tees = []
    for fd, console in enumerate(saved, start=1):
        if show:  # a process of its own, so that what a rank said before it was killed is not lost
            tee = subprocess.Popen(
                ["tee", "-a", "-i", str(path)], stdin=subprocess.PIPE, stdout=console, start_new_session=True, preexec_fn=deafen
            )
            assert tee.stdin
            os.dup2(tee.stdin.fileno(), fd)
            tee.stdin.close()
            tees.append(tee)
        else:
            with path.open("ab") as log:
                os.dup2(log.fileno(), fd)
    try:
        with os.fdopen(os.dup(saved[1]), "w", buffering=1) as console:
            yield console
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, console in enumerate(saved, start=1):
            os.dup2(console, fd)
            os.close(console)
        for tee in tees:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process that the rank left behind still holds the pipe
                tee.wait(timeout=2)
