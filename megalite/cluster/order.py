"""What `megalite submit` does with its command line: one run, a sweep, or a chain; submitted, or only shown.

In: the words behind the verb, and two readers of words that the command line lends.  Out: lines that say what was queued and where to look.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.cluster import chain, sweep
from megalite.cluster import submit as submitting
from megalite.cluster.settings import Batch, read_site
from megalite.config import explain, load
from megalite.errors import UserError

Say = Callable[[str], None]
Flags = dict[str, Any]
OWN = ("nodes", "slurm", "print")  # what is submit's and not the run's


def submit_run(name: str, flags: Flags, *, say: Say) -> None:
    """`megalite submit RECIPE|FILE.yaml`; `flags` is nested as the run is."""
    job, site, batch = _training(name, flags)
    if batch.print:
        return job.show(say)
    number = submitting.submit(job, site, say=say)
    return _tell(job, number, say)


def submit_sweep(batch: Batch, flags: Flags, *, say: Say, read_run: sweep.ReadRun) -> None:
    """`megalite submit --sweep FILE`."""
    wanted, site = sweep.read(str(batch.sweep)), read_site(flags)
    rows = sweep.plan(wanted, site, nodes=batch.nodes, read_run=read_run)
    job = sweep.job(wanted, rows, site, nodes=batch.nodes)
    for number, row in enumerate(rows):
        if row["refused"]:
            say(f"row {number} is left out: {row['refused']}")
    if batch.print:
        return job.show(say)
    number = submitting.submit(job, site, say=say, prepare=lambda: sweep.write(job.folder, rows))
    return _tell(job, number, say)


def submit_chain(batch: Batch, flags: Flags, *, say: Say, read: Callable[[list[str]], tuple[str, Flags]]) -> None:
    """`megalite submit --chain FILE`; `read` takes the words of a `train` link apart as submit_run wants them."""
    links, site, jobs = chain.read(str(batch.chain)), read_site(flags), []
    home = Path("runs", Path(str(batch.chain)).stem).absolute()
    for verb, words in links:
        if verb == "train":
            name, own = read(words)
            merged = {**own, "slurm": {**flags, **own.get("slurm", {})}}
            jobs.append(_training(name, {"nodes": batch.nodes, **merged}, ready=False)[0])
        else:
            jobs.append(chain.task(verb, words, site, nodes=batch.nodes, home=home))
    if batch.print:
        for job in jobs:
            job.show(say, *([chain.AFTER.format("THE-JOB-BEFORE"), chain.GO] if job is not jobs[0] else []))
        return
    chain.queue(jobs, told=say)


def read_batch(flags: Flags) -> tuple[Batch, Flags]:
    """What a sweep or chain was given: its settings, and --slurm.* as they came."""
    try:
        batch = Batch.model_validate({key: value for key, value in flags.items() if key != "slurm"})
    except ValidationError as error:
        raise UserError(explain(error, Batch)) from None
    if batch.sweep and batch.chain:
        raise UserError("--sweep and --chain are two things; submit one after the other")
    return batch, flags.get("slurm", {})


def _training(name: str, flags: Flags, *, ready: bool = True) -> tuple[submitting.Job, Any, Batch]:
    """The job of one run; `ready`: its shards exist now."""
    run = {key: value for key, value in flags.items() if key not in OWN}
    batch, wanted = read_batch({key: value for key, value in flags.items() if key in OWN})
    site, config = read_site(wanted), load(name, overrides=run)
    if ready:
        submitting.check_shards(config)
    return submitting.training([name, *flatten(run)], config, site, nodes=batch.nodes), site, batch


def flatten(flags: Flags, prefix: str = "") -> list[str]:
    """Nested flags as the words of a command line again."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, dict):
            words += flatten(value, f"{prefix}{name}.")
        else:
            words += sweep.words({f"{prefix}{name}": value})
    return words


def _tell(job: submitting.Job, number: str, say: Say) -> None:
    say(f"job {number:<7}{_short(job.folder)}/")
    say(f"output     {_short(job.folder)}/slurm/")
    say(f"status     megalite jobs {_short(job.folder)}")
    if job.name == "sweep":
        return say(f"stop       scancel {number}, or one row: touch {_short(job.folder)}/row-N/control/stop")
    return say(f"stop       touch {_short(job.folder)}/control/stop   (saves first; scancel {number} does not)")


def _short(folder: Path) -> str:
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
