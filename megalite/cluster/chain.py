"""Chains: jobs of which each waits until the one before it succeeded: prepare -> train -> evaluate -> export.

In: a YAML list of {verb: "arguments"}.  Out: the jobs' numbers; or a UserError, and none of them queued. A verb can be a link where slurm/
has a script for it; `train` takes what `megalite submit` takes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import yaml

from megalite.cluster import commands, history, submit
from megalite.cluster.script import container_variables, ranks_options, render, task_options
from megalite.cluster.settings import Site, scripts
from megalite.errors import UserError

AFTER = "--dependency=afterok:{}"
GO = "--kill-on-invalid-dep=yes"  # what can never start leaves the queue
ON_RANKS = ("finetune", "evaluate")  # the other scripts are one process


def read(name: str) -> list[tuple[str, list[str]]]:
    """(verb, arguments) of each link. Raises UserError for a file that is no chain."""
    try:
        document = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"chain file {name} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"chain file {name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, list) or not all(isinstance(link, dict) and len(link) == 1 for link in document):
        raise UserError(f"chain file {name} must be a list of links, each `VERB: arguments`; docs/slurm.md shows one")
    links = [(verb, shlex.split(str(words))) for link in document for verb, words in link.items()]
    known = ["train", *sorted({path.stem for path in scripts().glob("*.sbatch")} - {"pretrain", "sweep", "bench"})]
    for verb, _ in links:
        if verb not in known:
            raise UserError(f"chain file {name}: {verb} cannot be a link; one of {', '.join(known)} can")
    return links


def task(verb: str, words: list[str], site: Site, *, nodes: int, home: Path) -> submit.Job:
    """A link that does not train a run: ranks on `nodes`, or one process; its script and output go to `home`."""
    named = {"name": verb, "output": submit.output(home), "comment": f"megalite {verb}"}
    variables = container_variables(site)
    if verb in ON_RANKS:
        options = ranks_options(site, nodes=nodes, **named)
        variables |= {"MEGALITE_SRUN": " ".join(site.srun)}
    else:
        options = task_options(site, **named)
    text = render(verb, site, options=options, variables=variables)
    return submit.Job(text, verb, tuple(words), home)


def queue(jobs: list[submit.Job], *, told: Callable[[str], None]) -> list[str]:
    """Queue all of them, each behind the one before; all or none."""
    for job in jobs:
        submit.refuse_second(job.folder)
        with submit.written(job) as script:
            commands.test(script, arguments=job.arguments)
    numbers: list[str] = []
    try:
        for job in jobs:
            submit.make(job.folder / history.FOLDER)
            behind = (AFTER.format(numbers[-1]), GO) if numbers else ()
            numbers.append(submit.queue(job, *behind))
            told(f"job {numbers[-1]}  {job.name} {shlex.join(job.arguments)}")
    except UserError:
        if numbers:
            commands.call("scancel", *numbers)
        raise
    return numbers
