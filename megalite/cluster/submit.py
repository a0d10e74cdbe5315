"""`megalite submit`: a run as a job, checked before it is queued.

In: a run, how many nodes, `--slurm.*`.  Out: a job's number; or a UserError and nothing queued, written or left behind: the mesh does not
fit nodes x ranks, the time limit leaves no time to save, sbatch refuses (unknown partition, account), the run folder is not seen from the
nodes, or a job of the same run is queued already.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalite.cluster import commands, history
from megalite.cluster.script import render, train_options, train_variables
from megalite.cluster.settings import Site, seconds
from megalite.config import Config, run_folder
from megalite.ds_config import read_document
from megalite.errors import UserError
from megalite.fit import resolve_mesh

LEAST_WORK = 60  # seconds between the start of a job and the signal to save; less is spent on starting alone
GLANCE = 10  # seconds that a free node may take to look for the run folder

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What goes to sbatch."""

    text: str  # the batch script
    name: str  # the script's file name
    arguments: tuple[str, ...]
    folder: Path  # where it lives: the run's, absolute

    def show(self, say: Say, *options: str) -> None:
        """Exactly what would be submitted."""
        say(self.text)
        home = self.folder / history.FOLDER
        say(f"# saved as {home}/{self.name}.sbatch (its output goes there, too: mkdir -p {shlex.quote(str(home))}) and submitted with:")
        say("# " + shlex.join(["sbatch", *options, f"{home}/{self.name}.sbatch", *self.arguments]))


def submit(job: Job, site: Site, *, say: Say, prepare: Callable[[], None] = lambda: None) -> str:
    """Check and queue a job that trains; returns its number. `prepare` writes what the job reads, when the checks are passed."""
    refuse_second(job.folder)
    with written(job) as script:
        commands.test(script, arguments=job.arguments)
    with made(job.folder / history.FOLDER):
        if not is_seen_from_a_node(job.folder, site):
            say(f"no node is free to look for {job.folder}; the job looks when it starts")
        prepare()
        return queue(job)


def training(words: Sequence[str], config: Config, site: Site, *, nodes: int) -> Job:
    """The job that trains a run; `words` are the arguments of `megalite train`. Raises UserError where it cannot be."""
    check_mesh(config, site, nodes=nodes)
    check_time(site)
    folder = run_folder(config).absolute()
    options = train_options(site, name=config.name, nodes=nodes, output=output(folder), comment=f"{commands.RUN}{folder}")
    text = render("pretrain", site, options=options, variables=train_variables(site, nodes=nodes))
    return Job(text, "pretrain", tuple(words), folder)


def check_mesh(config: Config, site: Site, *, nodes: int) -> None:
    """Raises UserError where the run does not fit the ranks, or the DeepSpeed JSON does not fit the run."""
    world = nodes * site.ranks
    least = site.min_nodes or nodes
    if least > nodes:
        raise UserError(f"slurm.min_nodes = {least} is more than nodes = {nodes}; lower it")
    if least < nodes and config.mesh.dp:
        raise UserError(
            f"slurm.min_nodes = {least} lets mesh.dp follow the nodes, but mesh.dp = {config.mesh.dp}; leave it out (--mesh.dp None)"
        )
    if world > 1:  # one rank alone forks what the mesh asks for
        try:
            config = resolve_mesh(config, world)
        except UserError as error:
            raise UserError(f"nodes x ranks = {nodes} x {site.ranks} = {world}: {error}") from None
    if least < nodes and config.mesh.dp and world > 1:
        fewer = config.model_copy(update={"mesh": config.mesh.model_copy(update={"dp": None})})
        try:
            resolve_mesh(fewer, least * site.ranks)
        except UserError as error:
            raise UserError(f"slurm.min_nodes x ranks = {least} x {site.ranks} = {least * site.ranks}: {error}") from None
    read_document(config)


def check_time(site: Site) -> None:
    """Raises UserError where the time limit leaves none to train in."""
    if site.time and seconds(site.time) < site.lead + LEAST_WORK:
        raise UserError(
            f"slurm.time = {site.time} is {seconds(site.time)} s, but the run is asked to save slurm.lead = {site.lead} s ahead of its end "
            f"and needs {LEAST_WORK} s to start; raise slurm.time, or lower slurm.lead to what a step and a save take"
        )


def check_shards(config: Config) -> None:
    """Raises UserError where the data do not exist: ranks that srun starts prepare none."""
    for entry in config.data.train:
        prefix = entry.rpartition("=")[0] or entry
        if not any(Path(f"{name}.idx").is_file() for name in (entry, prefix, f"{entry}.train", f"{prefix}.train")):
            raise UserError(
                f"data.train = {entry}: there are no shards; `megalite prepare` them first, or chain it (megalite submit --chain)"
            )


def refuse_second(folder: Path) -> None:
    """Raises UserError where a job of the same run waits or runs."""
    for job in commands.queued():
        if job.folder == str(folder):
            raise UserError(
                f"run.folder = {folder} has job {job.number} ({job.state.lower()}) already; scancel {job.number}, or wait for it"
            )


def is_seen_from_a_node(folder: Path, site: Site) -> bool:
    """Whether a node that is free now sees the run folder; False: none is free. Raises UserError where one does not see it."""
    with tempfile.NamedTemporaryFile(dir=folder / history.FOLDER, prefix=".seen-") as marker:
        names = ("partition", "account", "qos", "reservation")
        asked = [f"--{option}={getattr(site, option)}" for option in names if getattr(site, option)]
        look = ["sh", "-c", 'test -e "$1" && echo seen || echo unseen', "look", marker.name]
        alone = ["--nodes=1", "--ntasks=1", "--time=1", "--job-name=megalite-look", f"--immediate={GLANCE}", "--quiet"]
        done = commands.call("srun", *alone, *asked, *look)
    if "unseen" in done.stdout:
        raise UserError(f"run.folder = {folder} is not seen from the nodes; choose one on a disk that they share with this machine")
    return "seen" in done.stdout


def queue(job: Job, *options: str) -> str:
    """Keep the script in the run folder and hand it to sbatch; returns the job's number."""
    script = job.folder / history.FOLDER / f"{job.name}.sbatch"
    script.write_text(job.text)
    number = commands.submit(str(script), *options, arguments=job.arguments)
    history.append(job.folder, history.JOBS, job=number, name=job.name, arguments=job.arguments)
    return number


def output(folder: Path) -> Path:
    """Where a job's own output goes, in SLURM's words."""
    return folder / history.FOLDER / "%x-%j.out"


@contextlib.contextmanager
def written(job: Job) -> Any:
    """The script in a file for as long as sbatch looks at it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", prefix=f"{job.name}-") as file:
        file.write(job.text)
        file.flush()
        yield file.name


@contextlib.contextmanager
def made(folder: Path) -> Any:
    """A folder that goes again, with those above it that were made for it, where what happens inside fails."""
    new = next((path for path in reversed([folder, *folder.parents]) if not path.exists()), None)
    make(folder)
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(new, ignore_errors=True)
        raise


def make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.folder = {folder.parent} cannot be written ({error.strerror}); choose another run.folder") from None
