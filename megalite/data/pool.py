"""Worker processes that are dealt jobs one by one.

In: numbered jobs and how a worker begins its work. Out: (number, answer) as they are done; a worker's error is raised here. A worker is a
loop at the other end of a pipe: it ends when the pipe closes, also when the parent was killed.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from megalite.errors import UserError

Work = Callable[[Any], Any]


def serve(connection: Connection, begin: Callable[[], Work]) -> None:
    """A worker's life: a job comes in, its answer goes out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; closing the pipe ends us
    work = begin()
    while True:
        try:
            number, job = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = work(job)
        except (UserError, OSError) as problem:
            answer = problem
        except Exception:
            answer = RuntimeError(f"worker failed at {job!r}:\n{traceback.format_exc()}")
        try:
            connection.send((number, answer))
        except BrokenPipeError:
            return


def deal(jobs: Iterable[tuple[int, Any]], begin: Callable[[], Work], *, workers: int) -> Iterator[tuple[int, Any]]:
    """Deal jobs to at most `workers` processes, each of which calls `begin` (which is pickled) once and what it returns for every job."""
    import multiprocessing

    spawn = multiprocessing.get_context("spawn")
    left = iter(jobs)
    free: list[Connection] = []
    busy: dict[Connection, int] = {}
    processes = []
    try:
        while True:
            job = next(left, None) if len(busy) < workers else None
            if job is not None:
                if not free:
                    ours, theirs = spawn.Pipe()
                    process = spawn.Process(target=serve, args=(theirs, begin), daemon=True)
                    process.start()
                    theirs.close()
                    processes.append((process, ours))
                    free.append(ours)
                connection = free.pop()
                connection.send(job)
                busy[connection] = job[0]
                continue
            if not busy:
                return
            ready = wait(list(busy))
            for connection in [c for c in busy if c in ready]:
                try:
                    number, answer = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise RuntimeError("a worker process died (killed for its memory?); run again with fewer --workers") from None
                if isinstance(answer, Exception):
                    raise answer
                del busy[connection]
                free.append(connection)
                yield number, answer
    finally:
        for process, connection in processes:
            connection.close()
            process.join(0.5)
            process.kill()
            process.join()
