"""The door to SLURM's own programs: sbatch, squeue, sacct, sinfo, srun. Nothing else of megalite calls them.

In: their arguments.  Out: what they print. A program that is not there, or a controller that does not answer, is a UserError.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from megalite.errors import UserError

PATIENCE = 60.0  # seconds a controller may take
PERHAPS_LATER = "Requested node configuration is not available"  # also where nodes are down for a while: sbatch itself knows which
RUN = "megalite run "  # what a job's comment says before its run folder


@dataclass(frozen=True)
class Job:
    """A job that squeue knows."""

    number: str
    state: str
    reason: str
    nodes: str
    left: str  # of its time limit
    folder: str  # of its run; empty for a job that is not ours


def call(*command: str, patience: float = PATIENCE) -> subprocess.CompletedProcess[str]:
    """Run one of them; its exit code is the caller's to judge. Raises UserError where it is not installed or does not answer."""
    if not shutil.which(command[0]):
        raise UserError(f"{command[0]} is not on this machine; submit where SLURM is, or look at the script with --print")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=patience, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {patience:g} s; ask the cluster's operators, or try again later") from None


def submit(script: str, *options: str, arguments: Sequence[str]) -> str:
    """Hand a script to sbatch; returns the job's number. Raises UserError with what sbatch says."""
    done = call("sbatch", "--parsable", *options, script, *arguments)
    if done.returncode:
        raise UserError(f"sbatch refused the job: {complaint(done.stderr)}")
    return done.stdout.strip().partition(";")[0]


def test(script: str, *options: str, arguments: Sequence[str]) -> None:
    """Ask whether sbatch would take a script. Raises UserError with what it says: an unknown partition or account, too many nodes."""
    done = call("sbatch", "--test-only", *options, script, *arguments)
    if done.returncode and PERHAPS_LATER not in done.stderr:
        raise UserError(f"sbatch would refuse this job: {complaint(done.stderr)}; nothing was submitted")


def complaint(text: str) -> str:
    """sbatch's errors as one line."""
    lines = [re.sub(r"^(sbatch|srun|allocation failure|error|fatal)(: (error|fatal))?: ", "", line) for line in text.splitlines()]
    return "; ".join(line.strip() for line in lines if line.strip()) or "no reason given"


def queued() -> list[Job]:
    """This user's jobs, waiting and running."""
    done = call("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%N|%L|%k")
    if done.returncode:
        raise UserError(f"squeue failed: {complaint(done.stderr)}")
    jobs = []
    for line in done.stdout.splitlines():
        number, state, reason, nodes, left, comment = line.split("|", 5)
        jobs.append(Job(number, state, reason, nodes, left, comment.removeprefix(RUN) if comment.startswith(RUN) else ""))
    return jobs


def ended(number: str) -> str | None:
    """How a job that left the queue ended, where accounting knows it: a state and an exit code."""
    try:
        done = call("sacct", "--jobs", number, "--allocations", "--noheader", "--parsable2", "--format=State,ExitCode")
    except UserError:
        return None
    lines = done.stdout.splitlines()
    return lines[-1].strip().replace("|", ", ") if done.returncode == 0 and lines else None
