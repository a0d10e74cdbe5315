"""One layout measured in a process of its own, `megalite bench`, here or on a cluster; and what became of it where it was not.

In: the words of `megalite bench`, a folder, the seconds it may take.  Out: its result, or a row that says oom, timeout, crash, refused (bad
settings) or lost (a node failed), and why. No torch: `tune` asks for trials, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megalite.tune import report

REFUSAL = "megalite: "  # how a line to the user begins

Start = Callable[[list[str], Path, float], "int | str"]
"""Run `megalite WORDS` with its output in a file, for so many seconds at most: its exit code, "timeout", or "lost" where a node failed."""
OnSlurm = Callable[[str, int, "int | None"], Start]
"""Such a function for a profile, nodes, and the ranks a node that the layouts expect."""


def start_here(words: list[str], log: Path, timeout: float) -> int | str:
    """A `Start` that runs it on this machine, in a process of its own."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megalite", *words], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout=timeout)
        except BaseException as stop:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too
            process.wait()
            if isinstance(stop, subprocess.TimeoutExpired):
                return "timeout"
            raise


def run_case(arguments: list[str], folder: Path, *, timeout: float, start: Start = start_here) -> dict[str, Any]:
    """One layout measured: its result, or what became of it."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "output.log"
    code = start(["bench", *arguments, "--output", str(folder)], log, timeout)
    if code == "timeout":
        return _failed(arguments, "timeout", f"not done after {timeout:g} s")
    if code == "lost":
        return _failed(arguments, "lost", "a node failed, or the job was taken away")
    if code == 0:
        return report.read(str(folder / "results.json"))[0]
    return _failed(arguments, *_explain(code, log.read_text(errors="replace")))


def _explain(code: int | str, said: str) -> tuple[str, str]:
    """A status, and the line that says why. What SLURM tells of how it ended the others comes behind what ranks said themselves."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("srun:", "slurmstepd"))] or lines or [f"exit code {code}"]
    if refused := next((line for line in lines if line.startswith(REFUSAL)), None):
        return "refused", refused.removeprefix(REFUSAL)[:300]
    last = next((line for line in reversed(lines) if "rror" in line), lines[-1])[:300]
    if any(words in said.lower() for words in ("out of memory", "memoryerror", "oom-kill", "oom_kill")) or code in (-signal.SIGKILL, 137):
        return "oom", last
    return "refused" if code == 2 else "crash", last


def _failed(arguments: list[str], status: str, reason: str) -> dict[str, Any]:
    flags = arguments[1 : arguments.index("--steps")]
    words = " ".join(f"{name.removeprefix('--')}={value}" for name, value in zip(flags[::2], flags[1::2], strict=True))
    return {"name": arguments[0], "layout": words, "status": status, "reason": reason}
