"""What a job asks of SLURM, and what is the same for every job at a site: its profile.

In: `--slurm.*` flags, and a profile: a YAML file of the same settings, and of what else a site needs (module loads, network variables).
Out: a `Site`, default < profile < flag. Nothing here calls SLURM.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError

from megalite.config import Config, explain, suggest
from megalite.errors import UserError
from megalite.upkeep import Section

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


def seconds(time: str) -> int:
    """What SLURM takes for a time: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises UserError for anything else."""
    found = TIME.fullmatch(time)
    if not found:
        raise UserError(f"slurm.time = {time!r} is no time; write 30 (minutes), 24:00:00 or 3-12:00:00")
    days, first, second, third = (None if part is None else int(part) for part in found.group("days", "first", "second", "third"))
    if days is not None:
        return days * 86400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return (first or 0) * 3600 + (second or 0) * 60 + third
    return (first or 0) * 60 + (second or 0)


def _is_time(time: str) -> str:
    seconds(time)
    return time


class Slurm(Section):
    profile: str | None = None
    """What is the same for every job at your site: the name of a file of slurm/profiles, or the path of one of your own (.yaml)."""
    time: Annotated[str, AfterValidator(_is_time)] | None = None
    """Time limit as sbatch --time takes it, 24:00:00; the run goes on in the next job after it."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    qos: str | None = None
    """sbatch --qos."""
    reservation: str | None = None
    """sbatch --reservation."""
    constraint: str | None = None
    """sbatch --constraint."""
    exclude: str | None = None
    """sbatch --exclude: nodes not to use. Nodes that fail the health check are left out by themselves."""
    gpus_per_node: NonNegativeInt = 8
    """GPUs a node; 0: ranks on CPUs."""
    gres: str | None = None
    """sbatch --gres, gpu:h100:8, for a site that wants its GPUs asked for so; left out: --gpus-per-node."""
    ranks_per_node: PositiveInt | None = None
    """Ranks a node; left out: one a GPU."""
    cpus_per_rank: PositiveInt | None = None
    """CPUs, and threads of PyTorch on a CPU, a rank; left out: what SLURM gives, and one thread."""
    memory: str | None = None
    """Memory a node, as sbatch --mem; left out: all of it (0) with slurm.exclusive, else what SLURM gives."""
    exclusive: bool = True
    """Share the nodes with nobody."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """srun: one task a rank; torchrun: one task a node, which starts its ranks."""
    container: str | None = None
    """Image for pyxis' --container-image; megalite is in it."""
    mounts: tuple[str, ...] = ()
    """For pyxis' --container-mounts, FROM:TO each; the working directory is mounted in any case."""
    lead: PositiveInt = 300
    """Seconds ahead of the time limit at which the run saves and asks for the next job. More than a step and a save take."""
    spares: NonNegativeInt = 0
    """Nodes beyond --nodes in the allocation: one takes the place of a node that fails, without waiting in the queue."""
    min_nodes: PositiveInt | None = None
    """Go on with fewer nodes than --nodes, down to this many, where nodes failed and no spare is left; mesh.dp must be left out."""
    health: bool = True
    """Check every node before training: memory, GPUs, disk, clock, versions, a matmul, an all-reduce in and across nodes."""
    same_failure: PositiveInt = 3
    """How often in a row the run may fail in the same way at the same step before it is given up."""
    max_excluded: NonNegativeInt = 4
    """How many bad nodes may be left out before the run is given up, because something else must be wrong."""

    @property
    def ranks(self) -> int:
        """Ranks a node."""
        return self.ranks_per_node or self.gpus_per_node or 1


class Site(Slurm):
    """A profile's settings; those of `Slurm` may be given as flags, too."""

    setup: tuple[str, ...] = ()
    """Lines of bash for the batch script, before anything runs: module loads, the activation of an environment."""
    environment: dict[str, str] = Field(default_factory=dict)
    """Variables for the ranks: NCCL_IB_HCA and the like."""
    sbatch: tuple[str, ...] = ()
    """Further options for sbatch, one each, as they stand behind #SBATCH."""
    srun: tuple[str, ...] = ()
    """Further options for srun where it starts the ranks."""


class _Flags(Section):
    """So that a message calls a setting what its flag is called."""

    slurm: Site


class Submission(Config):
    """What `megalite submit` is told: a run, and how it is to run on the cluster."""

    nodes: PositiveInt = 1
    """Nodes to train on."""
    slurm: Slurm = Slurm()
    """What SLURM is asked for."""
    print: bool = False
    """Show the batch script and the command that would submit it, and submit nothing."""


class Batch(Section):
    """What `megalite submit --sweep` and `--chain` are told."""

    sweep: str | None = None
    """A file of runs, each with flags of its own (docs/slurm.md); they become one array job."""
    chain: str | None = None
    """A file of jobs, each of which waits until the one before it succeeded (docs/slurm.md)."""
    nodes: PositiveInt = 1
    """Nodes a run is trained on."""
    slurm: Slurm = Slurm()
    """What SLURM is asked for."""
    print: bool = False
    """Show the batch script and the command that would submit it, and submit nothing."""


def scripts() -> Path:
    """The folder slurm/ as it was installed: beside the package in a clone, `megalite_slurm` in a wheel (setup.py)."""
    beside = Path(__file__).parents[2] / "slurm"
    return beside if (beside / "pretrain.sbatch").is_file() else beside.with_name("megalite_slurm")


def profiles() -> list[str]:
    """Names of the profiles that come with megalite."""
    return sorted(path.stem for path in (scripts() / "profiles").glob("*.yaml"))


def read_site(flags: dict[str, Any]) -> Site:
    """The profile that the flags name, with the flags on top.

    Raises UserError for a profile that does not exist, and for keys and values that no setting knows.
    """
    name = flags.get("profile")
    document = _read_profile(str(name)) if name else {}
    try:
        Site.model_validate(document)  # so that a message names the file whose mistake it is
    except ValidationError as error:
        raise UserError(f"profile {name}: {explain(error, Site)}") from None
    try:
        return _Flags.model_validate({"slurm": {**document, **flags}}).slurm
    except ValidationError as error:
        raise UserError(explain(error, _Flags)) from None


def _read_profile(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        source = Path(name)
        if not source.is_file():
            raise UserError(f"slurm.profile = {name} does not exist; give an existing .yaml file, or one of {', '.join(profiles())}")
    elif name in profiles():
        source = scripts() / "profiles" / f"{name}.yaml"
    else:
        raise UserError(
            f"slurm.profile = {name} is none of {', '.join(profiles())}{suggest(name, profiles())}; a file of your own ends in .yaml"
        )
    try:
        # every value as it stands: to YAML 1.1, 24:00:00 is a number of seconds
        document = yaml.load(source.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"profile {name} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict) or "profile" in document:
        raise UserError(f"profile {name} must be a mapping of settings, none of them `profile`; see slurm/profiles for examples")
    return {key: None if value in ("", "null", "~") else value for key, value in document.items()}
