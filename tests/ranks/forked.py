"""A command of megalite in a fork of this process, which has imported what the command needs: seconds sooner than a fresh interpreter.

It is handled like a subprocess.Popen: pid (of a process group), poll, wait, communicate, returncode, send_signal. That the commands start
in an interpreter of their own, too, tests/docs sees to.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NoReturn

import psutil
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed decides when it is imported

import megalite.parallel.zero
import megalite.pretrain
import megalite.train  # noqa: F401  what `megalite train` would import
from megalite.cli import main


class Forked:
    """`megalite ARGUMENTS` in its own session; `before` is code to run first, to plant a fault."""

    def __init__(self, arguments: list[str], *, cwd: Path | None = None, before: str | None = None) -> None:
        self.args, self.returncode = arguments, None
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  they live as long as this does
        sys.stdout.flush()
        sys.stderr.flush()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(arguments, cwd, before)
        gc.unfreeze()
        while os.getpgid(self.pid) != self.pid:  # whoever signals its group must not signal ours
            time.sleep(0.001)

    def poll(self) -> int | None:
        if self.returncode is None and (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(found[1])
        return self.returncode

    def wait(self, timeout: float = 240.0) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """What it wrote to stdout and to stderr, when it is over."""
        self.wait(timeout)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def ranks(self) -> list[psutil.Process]:
        """Those that live, in the order of their numbers: they are forked in that order, and process ids begin again after the last."""
        return sorted(psutil.Process(self.pid).children(), key=lambda rank: (rank.pid - self.pid) % 2**22)  # no kernel has more ids

    def kill(self) -> None:
        """SIGKILL to its group; back when its ranks, which die of its death, are gone, and with them what they held."""
        ranks = psutil.Process(self.pid).children(recursive=True)
        os.killpg(self.pid, signal.SIGKILL)
        self.wait()
        psutil.wait_procs(ranks, timeout=20)

    def _be(self, arguments: list[str], cwd: Path | None, before: str | None) -> NoReturn:
        code: object = 1
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self.out.fileno(), 1)
            os.dup2(self.err.fileno(), 2)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115  theirs for life
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))  # noqa: SIM115
            for handler in logging.getLogger().handlers[:]:  # pytest's
                logging.getLogger().removeHandler(handler)
            torch.set_num_threads(1)  # the pool of our parent's threads did not survive the fork
            sys.argv = ["megalite", *arguments]
            if cwd:
                os.chdir(cwd)
            if before:
                exec(before, {})
            main(arguments)
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)
