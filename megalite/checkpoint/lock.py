"""One job a run folder: whoever trains in it holds a lock, which the system takes back when the holder dies, however it dies.

In: a run folder.  Out: a context in which no other process, on this machine or on another that sees the same disk, trains there. The lock
is flock(2) on FOLDER/.lock: NFS and Lustre (mounted with flock) carry it between machines. Where a disk knows no locks, that is said.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from megalite.errors import UserError

FILE = ".lock"
LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Keep others out of a run folder. Raises UserError naming the holder when one is in it, still after `patience` seconds."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / FILE).open("a+")
    except OSError as error:
        raise UserError(f"run.folder = {folder} cannot be written ({error.strerror}); choose another run.folder") from None
    with file:
        _lock(file, folder, until=time.monotonic() + patience)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now().astimezone().isoformat(timespec='seconds')}\n")
        file.flush()
        yield


def _lock(file: IO[str], folder: Path, *, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(1.0)
                continue
            file.seek(0)
            holder = file.read().strip() or "another job"
            raise UserError(f"run.folder = {folder} is in use by {holder}; end that job, or choose another run.folder") from None
        except OSError as error:
            return LOG.warning("%s: this disk knows no locks (%s); see to it that no second job runs there", folder, error.strerror)
