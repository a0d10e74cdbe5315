"""One layout measured as a job of its own: `megalite bench` on the nodes of a cluster, submitted, waited for, and how it ended.

In: a site, how many nodes, the words of `megalite bench`.  Out: an exit code, or in a word what SLURM made of the job. The job notes its
exit code in a file; where there is none, it did not live to do so, and its output says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from megalite.cluster import commands
from megalite.cluster.script import container_variables, ranks_options, render
from megalite.cluster.settings import Site
from megalite.errors import UserError

POLL = 5.0  # seconds between two looks at the queue
LATE = 15.0  # seconds that a shared disk may take to show what a job wrote
Start = Callable[[list[str], Path, float], "int | str"]


def starter(site: Site, *, nodes: int, gpus: int | None = None, poll: float = POLL) -> Start:
    """A function of (words behind `megalite`, file for the output, seconds it may take) that runs them on so many nodes and waits.

    It returns the exit code, "timeout", or "lost" where a node failed. `gpus` are the ranks a node that the words expect. Raises UserError
    where the site has another number of them.
    """
    if gpus is not None and site.ranks != gpus:
        raise UserError(f"the cluster has {gpus} GPUs a node, but the profile starts {site.ranks} ranks a node; let them agree")

    def start(words: list[str], log: Path, timeout: float) -> int | str:
        assert words[0] == "bench"
        ended, script = log.with_name("exit-code"), log.with_name("bench.sbatch")
        for old in (ended, log):
            old.unlink(missing_ok=True)
        limited = site.model_copy(update={"time": f"{max(1, math.ceil(timeout / 60))}"})
        options = [
            option
            for option in ranks_options(limited, name="bench", nodes=nodes, output=log.absolute(), comment="megalite bench")
            if not option.startswith(("--signal", "--requeue"))
        ]
        variables = {"MEGALITE_RANKS": f"{site.ranks}", "MEGALITE_SRUN": " ".join(site.srun), "MEGALITE_ENDED": f"{ended.absolute()}"}
        text = render("bench", site, options=[*options, "--no-requeue"], variables={**variables, **container_variables(site)})
        script.write_text(text)
        number = commands.submit(str(script), arguments=words[1:])
        try:
            while any(job.number == number for job in commands.queued()):
                time.sleep(poll)
        except BaseException:
            commands.call("scancel", number)
            raise
        return _read_end(ended, log)

    return start


def _read_end(ended: Path, log: Path) -> int | str:
    patience = time.monotonic() + LATE
    while True:
        said = log.read_text(errors="replace") if log.exists() else ""
        if ended.exists() and (code := ended.read_text().strip()):
            return int(code)
        if "DUE TO TIME LIMIT" in said:
            return "timeout"
        if "NODE FAILURE" in said or "NODE_FAIL" in said:
            return "lost"
        if time.monotonic() > patience:
            return "lost"  # it wrote nothing at all: the node took it along
        time.sleep(0.5)
