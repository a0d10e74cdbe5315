"""A SLURM cluster on this machine, and runs on it, for tests: what a person does at a login node, and what befalls nodes and ranks.

Each node is its own network, host name and process namespace, so that it can crash or lose its network (local-cluster.sh).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

SCRIPT = Path(__file__).with_name("local-cluster.sh")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "shellcheck")
PLACES = f"{os.environ['PATH']}:/usr/sbin:/sbin"
WHY_NOT = (
    "need root on Linux and a local SLURM (Debian, Ubuntu: apt-get install slurmctld slurmd slurm-client munge iproute2 shellcheck)"
    if os.name != "posix" or os.geteuid() or not all(shutil.which(name, path=PLACES) for name in NEEDED)
    else ""
)
PATIENCE = 900  # seconds
# python -m megalite train ..., held in front of each step until a file allows it: things can then befall a run at a known step, however
# slow the machine is; any other command runs as it is
HELD = """#!/usr/bin/env bash
if [[ "$*" != "-m megalite train "* ]]; then exec {python} "$@"; fi
shift 2
export DS_ACCELERATOR=cpu
exec {python} -c '
import os, sys, time
import megalite.engine as engine
plain = engine.Engine.step
def held(self, step, *rest):
    time.sleep({seconds})
    while os.path.exists("{gate}") and step >= int(open("{gate}").read()):
        time.sleep(0.05)
    return plain(self, step, *rest)
engine.Engine.step = held
from megalite.cli import main
main(sys.argv[1:])' "$@"
"""


class Cluster:
    """Commands at its login node; `folder` is where they are given."""

    def __init__(self, state: Path, folder: Path, *, subnet: str, nodes: int = 5) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "LOCAL_SLURM_DIR": str(state),
            "LOCAL_SLURM_SUBNET": subnet,
            "SLURM_CONF": str(state / "slurm.conf"),
            "LOCAL_SLURM_KILLWAIT": "5",
        }
        self.do("stop")  # what a run that was killed left
        self.do("start", str(nodes), "4")

    def do(self, *words: str) -> None:
        """start, stop, crash NODE, boot NODE, cut NODE, heal NODE, hurry."""
        done = subprocess.run([SCRIPT, *words], env=self.environment, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr

    def call(self, *words: str) -> str:
        done = self.try_(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def try_(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=600)

    def megalite(self, *words: str) -> str:
        return self.call(sys.executable, "-m", "megalite", *words)

    def refusal(self, *words: str) -> str:
        """What `megalite` says to bad input; and it queued nothing."""
        before = self._numbers()
        done = self.try_(sys.executable, "-m", "megalite", *words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert self._numbers() <= before
        assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        return done.stderr

    def _numbers(self) -> set[str]:
        return set(self.call("squeue", "--noheader", "--format=%i").split())

    def submit(self, *words: str, ranks: int = 1, **site: Any) -> str:
        """The number of the job that `megalite submit WORDS` queues, on CPUs."""
        return self.megalite("submit", *words, "--slurm.profile", self.profile(ranks_per_node=ranks, **site)).split()[1]

    def profile(self, *, seconds: float = 0.0, held: str = "nobody", **site: Any) -> str:
        """A site without GPUs. A step takes `seconds` longer; where `allow` was called for `held`, steps wait for it."""
        python = self.folder / f"python-{time.monotonic_ns()}"
        python.write_text(HELD.format(python=sys.executable, seconds=seconds, gate=self._gate(held)))
        python.chmod(0o755)
        path = python.with_suffix(".yaml")
        plain = {"gpus_per_node": 0, "exclusive": False, "health": False, "time": "120"}  # minutes, far beyond slurm.lead
        given = {**plain, "setup": [f"export MEGALITE_PYTHON={python}"], **site}
        path.write_text(yaml.safe_dump(given))
        return str(path)

    def allow(self, run: str, steps: int) -> None:
        """Let a held run take so many steps in all; it then waits in the next one."""
        fresh = self._gate(run).with_suffix(".new")
        fresh.write_text(str(steps))
        fresh.replace(self._gate(run))

    def _gate(self, run: str) -> Path:
        return self.folder / f"{run}.gate"

    def state(self, job: str) -> str:
        return self.call("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def finish(self, job: str, *, state: str = "COMPLETED") -> None:
        """Wait for a job to end, through requeues."""
        done = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait(lambda: self.hurry() or self.state(job) in done, f"job {job} to end")
        assert self.state(job) == state, self.told(job)

    def hurry(self) -> None:
        """Slurm holds a requeued job for two minutes; lift that, once: it then begins three seconds from now."""
        for line in self.call("squeue", "--noheader", "--states=PD", "--format=%r|%S").splitlines():
            reason, _, start = line.partition("|")
            if reason == "BeginTime" and start != "N/A" and (datetime.fromisoformat(start) - datetime.now()).total_seconds() > 5:
                self.do("hurry")
                return

    def wait(self, happened: Callable[[], Any], what: str) -> None:
        """A deadline no healthy machine comes near: beside other tests on two slow cores, a start that takes 10 s alone took 90."""
        until = time.monotonic() + PATIENCE
        while not happened():
            assert time.monotonic() < until, f"waited {PATIENCE} s for {what}\n{self.call('squeue', '--long')}\n{self.told()}"
            time.sleep(0.3)

    def restarts(self, job: str) -> int:
        """How often it has gone back into the queue; on a busy machine it may have left it between two looks at its state."""
        found = re.search(r"Restarts=(\d+)", self.call("scontrol", "show", "job", job))
        assert found, job
        return int(found[1])

    def told(self, job: str = "") -> str:
        """What jobs said."""
        return "\n".join(
            f"=== {path}\n{path.read_text()}" for path in self.folder.glob(f"runs/**/slurm/*{job}.out" if job else "runs/**/slurm/*.out")
        )

    def reach(self, run: str, step: int, *, start: int = 1) -> None:
        """Wait until a run has logged that step, in its `start`-th attempt."""
        self.wait(
            lambda: self.hurry() or (len(self.attempts(run)) >= start - 1 and self.step(run) >= step and self.lives(run)),
            f"step {step} of {run} in start {start}",
        )

    def lives(self, run: str) -> bool:
        """Whether an attempt is under way that has begun to train."""
        folder = self.folder / "runs" / run / "slurm"
        judged = {line["attempt"] for line in self.attempts(run)}
        return any(path.parent.name not in judged for path in folder.glob("*-*-*/start.json"))

    def step(self, run: str) -> int:
        path = self.folder / "runs" / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def attempts(self, run: str) -> list[dict[str, Any]]:
        path = self.folder / "runs" / run / "slurm/attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def ranks(self, node: str) -> list[psutil.Process]:
        """The ranks that run on a node, in the order of their numbers."""
        found = []
        for process in psutil.process_iter(["cmdline", "environ"]):
            environment = process.info["environ"] or {}
            words = process.info["cmdline"] or []
            ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and environment.get("SLURMD_NODENAME") == node
            if ours and "MEGALITE_RECORDS" in environment and "train" in words and "-c" in words:
                found.append((int(environment.get("SLURM_PROCID", -1)), process))
        return [process for _, process in sorted(found, key=lambda item: item[0])]
