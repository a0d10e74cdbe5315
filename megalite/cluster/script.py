"""The batch script that is submitted: one of slurm/*.sbatch with the #SBATCH lines of this job and the site's own lines in it.

In: the name of a script, a `Site`, and what this job asks for.  Out: text for sbatch. What it holds is fixed when it is submitted; a
profile that is changed later changes no job that waits.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite.cluster.settings import Site, scripts

BEGIN, END = "# ---- site", "# ---- end of site"


def render(name: str, site: Site, *, options: Sequence[str], variables: Mapping[str, str]) -> str:
    """slurm/NAME.sbatch with these #SBATCH options, and variables beside the site's."""
    lines = (scripts() / f"{name}.sbatch").read_text().splitlines()
    directives = [at for at, line in enumerate(lines) if line.startswith("#SBATCH")]
    begin, end = (next(at for at, line in enumerate(lines) if line.startswith(mark)) for mark in (BEGIN, END))
    return "\n".join(
        [
            *lines[: directives[0]],
            *(f"#SBATCH {option}" for option in options),
            *lines[directives[-1] + 1 : begin + 1],
            *site_lines(site, variables),
            *lines[end:],
            "",
        ]
    )


def site_lines(site: Site, variables: Mapping[str, str]) -> list[str]:
    """What stands between the marks. Without a container and setup of the site's own, the Python that submits is the one that runs."""
    lines = list(site.setup)
    if not site.setup and not site.container:
        lines.append(f"export MEGALITE_PYTHON={shlex.quote(sys.executable)}")
    lines += [f"export {name}={shlex.quote(value)}" for name, value in {**site.environment, **variables}.items()]
    return lines


def train_options(site: Site, *, name: str, nodes: int, output: Path | str, comment: str) -> list[str]:
    """#SBATCH options of a job that trains."""
    least, most = site.min_nodes or nodes, nodes + site.spares
    options = ranks_options(site, name=name, nodes=f"{least}-{most}" if least < nodes else most, output=output, comment=comment)
    if site.spares or least < nodes:
        options.append("--no-kill")  # a node that fails does not end the job
    return options


def ranks_options(site: Site, *, name: str, nodes: int | str, output: Path | str, comment: str) -> list[str]:
    """#SBATCH options of a job of ranks, which is told ahead of its time limit."""
    options = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        # of a range of nodes, a number of tasks takes the fewest (SLURM 22.05.8); CPUs alone take as many as are free
        f"--mincpus={site.ranks * (site.cpus_per_rank or 1)}" if isinstance(nodes, str) else f"--ntasks-per-node={site.ranks}",
        *_gpus(site),
        *_given(site),
        f"--signal=B:USR1@{site.lead}",
        "--requeue",
        "--open-mode=append",
        f"--output={output}",
        f"--comment={shlex.quote(comment)}",
    ]
    if site.cpus_per_rank:
        options.append(f"--cpus-per-task={site.cpus_per_rank}")
    if site.exclusive:
        options.append("--exclusive")
    if memory := site.memory or ("0" if site.exclusive else None):
        options.append(f"--mem={memory}")
    return [*options, *site.sbatch]


def task_options(site: Site, *, name: str, output: Path | str, comment: str) -> list[str]:
    """#SBATCH options of a job that is one process on one node, without GPUs."""
    return [
        f"--job-name={name}",
        "--nodes=1",
        "--ntasks=1",
        *_given(site),
        "--requeue",
        "--open-mode=append",
        f"--output={output}",
        f"--comment={shlex.quote(comment)}",
        *site.sbatch,
    ]


def train_variables(site: Site, *, nodes: int) -> dict[str, str]:
    """What pretrain.sbatch and sweep.sbatch want to know."""
    known = {
        "MEGALITE_NODES": nodes,
        "MEGALITE_RANKS": site.ranks,
        "MEGALITE_GPUS": site.gpus_per_node,
        "MEGALITE_SPARES": site.spares,
        "MEGALITE_MIN_NODES": site.min_nodes or nodes,
        "MEGALITE_LAUNCHER": site.launcher,
        "MEGALITE_HEALTH": int(site.health),
        "MEGALITE_SAME_FAILURE": site.same_failure,
        "MEGALITE_MAX_EXCLUDED": site.max_excluded,
        "MEGALITE_LEAD": site.lead,
        "MEGALITE_SRUN": " ".join(site.srun),
    }
    return {**{name: str(value) for name, value in known.items()}, **container_variables(site)}


def container_variables(site: Site) -> dict[str, str]:
    return {"MEGALITE_CONTAINER": site.container, "MEGALITE_MOUNTS": ",".join(site.mounts)} if site.container else {}


def _gpus(site: Site) -> list[str]:
    if site.gres:
        return [f"--gres={site.gres}"]
    return [f"--gpus-per-node={site.gpus_per_node}"] if site.gpus_per_node else []


def _given(site: Site) -> list[str]:
    """Options that sbatch calls what we call them."""
    names = ("time", "partition", "account", "qos", "reservation", "constraint", "exclude")
    return [f"--{name}={getattr(site, name)}" for name in names if getattr(site, name) is not None]
