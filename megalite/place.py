"""Where a rank that torchrun or srun started stands, from the variables they set.

In: an environment.  Out: rank, world, hosts, and the ports at which the ranks of this job step look for each other. Several jobs may share
a node, so a port computed from a job's number is only where the search begins: rank 0 listens at the first of `ports` that is free, and
the others ask each for `token`, which no two steps share. Nothing here imports torch; host lists are read without `scontrol`, which a
container need not have.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import psutil

FIRST_PORT, PORTS = 15_000, 15_000  # below where systems hand out ports by themselves (Linux: from 32768)
TRIES = 32  # jobs, or other programs, that may sit in front of ours
RECORDS = "MEGALITE_RECORDS"  # a folder for what `launch.record` notes, one for each attempt of a job


@dataclass(frozen=True)
class Place:
    """One rank among `world`; `hosts` is known under SLURM alone, `port` is fixed where somebody set MASTER_PORT."""

    rank: int
    world: int
    local_rank: int
    address: str
    port: int | None = None
    job: int = 0
    step: int = 0
    hosts: tuple[str, ...] = ()
    attempt: str = ""

    @property
    def ports(self) -> list[int]:
        """Where to look, in this order."""
        if self.port is not None:
            return [self.port]
        begin = self.job * 31 + self.step * TRIES
        return [FIRST_PORT + (begin + number) % PORTS for number in range(TRIES)]

    @property
    def token(self) -> str:
        """What the ranks of this step, and nobody else, call their meeting."""
        return f"megalite/{self.job}.{self.step}/{self.attempt}"


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Where this process stands if torchrun or srun started it as one of several ranks; None if it stands alone.

    A batch script that calls no srun is told SLURM_PROCID and SLURM_NTASKS, too; only a step has SLURM_STEP_ID.
    """
    get = environment.get
    if get("RANK") and get("WORLD_SIZE"):
        rank, world, local = int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(get("LOCAL_RANK", "0"))
    elif get("SLURM_STEP_ID") and get("SLURM_PROCID"):
        rank, world = int(environment["SLURM_PROCID"]), int(get("SLURM_STEP_NUM_TASKS") or get("SLURM_NTASKS", "1"))
        local = int(get("SLURM_LOCALID", "0"))
        if world == 1:
            return None
    else:
        return None
    hosts = tuple(expand_hosts(get("SLURM_STEP_NODELIST") or get("SLURM_JOB_NODELIST") or ""))
    port = get("MASTER_PORT")
    return Place(
        rank=rank,
        world=world,
        local_rank=local,
        address=get("MASTER_ADDR") or (hosts[0] if hosts else "127.0.0.1"),
        port=int(port) if port else None,
        job=int(get("SLURM_JOB_ID", "0")),
        step=int(get("SLURM_STEP_ID", "0")),
        hosts=hosts,
        attempt=get(RECORDS, ""),
    )


def expand_hosts(nodelist: str) -> list[str]:
    """gpu[07-09,12],cpu1 -> gpu07 gpu08 gpu09 gpu12 cpu1, as `scontrol show hostnames` does; several brackets a name, too."""
    return [host for part in re.split(r",(?![^\[]*\])", nodelist) if part for host in _expand(part)]


def _expand(pattern: str) -> Iterator[str]:
    found = re.search(r"\[([^\]]*)\]", pattern)
    if not found:
        yield pattern
        return
    before, after = pattern[: found.start()], pattern[found.end() :]
    for span in found[1].split(","):
        first, _, last = span.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from _expand(f"{before}{number:0{len(first)}}{after}")


def find_interface(peer: str) -> tuple[str, str] | None:
    """The network interface, and its address, by which this machine reaches `peer` (IPv4 or IPv6); None where that is not to be known.

    Connecting a datagram socket sends nothing; it asks the routing table.
    """
    try:
        families = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in families:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                own = probe.getsockname()[0]
            for name, addresses in psutil.net_if_addrs().items():
                if any(entry.address.partition("%")[0] == own for entry in addresses):
                    return name, own
    except OSError:
        return None
    return None
