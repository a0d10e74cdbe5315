"""Ranks brought to life: forked on a CPU, one process a GPU, or joined under torchrun and srun.

In: how many ranks (or a `Config`, whose mesh says) and the function each of them runs.  Out: what that function returned, or the one
exception that `crew.py` found to be the first. On a machine without a GPU the parent imports once and forks, which brings up eight
ranks in a tenth of a second; on GPUs every rank is a fresh interpreter, because CUDA does not survive a fork. Both kinds meet in a file.
This module alone reads the environment; `torch.distributed` is initialised when the work begins, and DeepSpeed finds it so.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from megalite import config as settings
from megalite.crew import Failure, Link, RankError, run_crew
from megalite.errors import UserError
from megalite.fit import resolve_mesh
from megalite.log import own_log, rank_log
from megalite.meeting import meet
from megalite.place import RECORDS, Place, find_interface, find_place

PATIENCE = 600.0  # seconds a rank waits for another before it calls it lost
REPORTS, CONSOLE = "MEGALITE_REPORTS", "MEGALITE_CONSOLE"  # where `end_rank` speaks: the pipe to the parent, or the console that srun shows
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
Warm = Sequence[str | Callable[[], Any]]


@dataclass(frozen=True)
class Orders:
    """What every rank of one launch is told."""

    world: int
    work: Callable[[int], Any]
    backend: str
    folder: Path  # the meeting file lies here
    port: int
    timeout: float


def run_ranks(
    world: int, work: Callable[[int], Any], *, folder: str | Path | None = None, warm: Warm = (), timeout: float = PATIENCE
) -> list[Any]:
    """Run work(rank) on `world` forked gloo ranks of this CPU; returns what each returned, in the order of ranks.

    `warm` names modules to import (or functions to call) before forking. `timeout` is how long a rank may wait for another, at the
    start and in any collective. With a run folder every rank's output goes to folder/logs, and only rank 0's to the console.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed decides when it is imported, which may be now
    for item in warm:
        importlib.import_module(item) if isinstance(item, str) else item()
    return _run(world, work, "gloo", folder=folder, timeout=timeout)


def start(config: settings.Config, work: Callable[[settings.Config, int], Any], *, warm: Warm = ()) -> Any:
    """Run work(config, rank), the config's mesh filled in, on as many ranks as there are; returns rank 0's result (joined: this rank's).

    Under torchrun or srun this process is one of the ranks already. Otherwise every visible GPU gets a process, for which `work` is
    pickled; without a GPU mesh.ranks, or else dp x pp x tp, ranks are forked. A mesh that does not fit is refused before any rank starts.
    """
    place, gpus, world = find_place(os.environ), torch.cuda.device_count(), count_ranks(config)
    try:
        config = resolve_mesh(config, world)
    except UserError:
        if place and place.rank:
            raise SystemExit(2) from None  # rank 0 says it for all
        raise
    folder, rank_work = settings.run_folder(config), functools.partial(work, config)
    if place:
        return _join(place, rank_work, folder=folder)
    try:
        if gpus:
            return _run(world, rank_work, "nccl", fresh=True, folder=folder)[0]
        return run_ranks(world, rank_work, folder=folder, warm=warm)[0]
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def count_ranks(config: settings.Config) -> int:
    """How many ranks `start` would have: those that were started with this one, else one a GPU, else what the mesh asks for."""
    place, mesh = find_place(os.environ), config.mesh
    gpus = torch.cuda.device_count()  # asks the driver's library and creates no context
    return place.world if place else gpus or mesh.ranks or mesh.world


def stands_alone() -> bool:
    """Whether this process will start the ranks itself; under torchrun or srun it is one of them."""
    return find_place(os.environ) is None


def meeting_host() -> str:
    """The host of rank 0, where ranks can reach it."""
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def end_rank(report: str, *, culprit: int | None = None) -> NoReturn:
    """End this rank with a report, from any thread, whatever its main thread is caught in; `culprit` is the rank whose fault it is."""
    record(f"rank-{os.environ.get('RANK', '0')}", kind="silent", report=report, culprit=culprit)
    if pipe := os.environ.get(REPORTS):
        link = Link(Connection(int(pipe), readable=False), -1)
        link.reports.send_bytes(pickle.dumps(("failed", Failure(time.monotonic(), report))))
    else:
        os.write(int(os.environ.get(CONSOLE, "2")), f"rank {os.environ.get('RANK', '0')} {report}\n".encode())
    sys.stdout.flush()
    os._exit(1)


def record(name: str, **facts: Any) -> None:
    """Note facts for the batch script that started this rank, where one did; a disk that fails then is no second failure."""
    if not (folder := os.environ.get(RECORDS)):
        return
    known = {"rank": int(os.environ.get("RANK", "0")), "node": node_name(), "time": time.time()}
    with contextlib.suppress(OSError):
        Path(folder).mkdir(parents=True, exist_ok=True)
        fresh = Path(folder, f"{name}.{os.getpid()}.new")
        fresh.write_text(json.dumps({**known, **facts}))
        fresh.replace(Path(folder, f"{name}.json"))


def is_rank_zero() -> bool:
    """Whether this process speaks for the run: it stands alone, or was started by torchrun or srun as rank 0."""
    place = find_place(os.environ)
    return place is None or place.rank == 0


def node_name() -> str:
    """What SLURM calls this machine, or else what it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def is_attended() -> bool:
    """Whether a batch script started this rank, which starts it again after a failure."""
    return RECORDS in os.environ


# ---- ranks that we start ---------------------------------------------------------------------------------------------------------------


def _run(
    world: int,
    work: Callable[[int], Any],
    backend: str,
    *,
    fresh: bool = False,
    folder: str | Path | None = None,
    timeout: float = PATIENCE,
) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="megalite-") as place:
        # DeepSpeed names its shared memory after the port, so every launch needs its own, though nobody listens there
        port = random.SystemRandom().randrange(10_000, 30_000)
        orders = Orders(world, work, backend, Path(place), port, timeout)
        if fresh:
            Path(place, "orders").write_bytes(pickle.dumps(orders))
        life = functools.partial(_be_reborn if fresh else _be_forked, orders)
        return run_crew(world, life, folder=Path(folder) if folder else None, timeout=timeout)


def _be_forked(orders: Orders, rank: int, link: Link) -> NoReturn:
    """The life of a rank on a CPU."""
    _announce(orders, rank)
    os.environ[REPORTS] = f"{link.reports.fileno()}"
    os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a laptop's host name may stand for an address that is gone
    torch.set_num_threads(1)  # also keeps the rank out of the parent's OpenMP pool, which did not survive the fork
    link.answer(functools.partial(_meet_and_work, orders, rank, link))


def _be_reborn(orders: Orders, rank: int, link: Link) -> NoReturn:
    """The life of a rank on a GPU, until it begins anew in `be_spawned`, as a fresh interpreter."""
    _announce(orders, rank)
    os.environ[REPORTS] = f"{link.reports.fileno()}"
    os.environ.setdefault("OMP_NUM_THREADS", f"{max(1, (os.cpu_count() or 1) // orders.world)}")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    for pipe in (pipes := (link.reports.fileno(), link.leave)):
        os.set_inheritable(pipe, True)
    few = f"import gc; gc.set_threshold({gc.get_threshold()[0]})"  # as cli.py said
    code = f"{few}; from megalite.launch import be_spawned; be_spawned(*{(str(orders.folder), rank, *pipes)!r})"
    os.execve(sys.executable, [sys.executable, "-u", "-c", code], os.environ)


def be_spawned(folder: str, rank: int, reports: int, leave: int) -> NoReturn:
    """The second life of a rank on a GPU; only `_be_reborn` comes here."""
    link = Link(Connection(reports, readable=False), leave)
    link.answer(lambda: _meet_and_work(pickle.loads(Path(folder, "orders").read_bytes()), rank, link))


def _announce(orders: Orders, rank: int) -> None:
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{orders.world}", LOCAL_WORLD_SIZE=f"{orders.world}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{orders.port}")


def _meet_and_work(orders: Orders, rank: int, link: Link) -> Any:
    if orders.backend == "nccl":
        torch.cuda.set_device(rank)
    link.arrive()  # from here on torch knows how to time out
    patience = timedelta(seconds=orders.timeout)
    meeting = f"file://{orders.folder}/meeting"
    dist.init_process_group(orders.backend, init_method=meeting, rank=rank, world_size=orders.world, timeout=patience)
    return orders.work(rank)


# ---- ranks that torchrun or srun started -----------------------------------------------------------------------------------------------


def join(work: Callable[[int], Any], *, patience: float = PATIENCE) -> Any:
    """Run work(rank) as one of the ranks that srun or torchrun started; alone, as the only one of a group of its own."""
    place = find_place(os.environ) or Place(0, 1, 0, "127.0.0.1")
    return _meet_all_and_work(place, work, _take_device(place), patience=patience)


def _take_device(place: Place) -> str:
    """Announce this rank to the libraries that read the environment, and take its GPU; the backend to talk over."""
    gpus = torch.cuda.device_count()
    local = place.local_rank % gpus if gpus else place.local_rank  # srun may show every rank its own GPU only
    os.environ.update(RANK=f"{place.rank}", WORLD_SIZE=f"{place.world}", LOCAL_RANK=f"{local}", MASTER_ADDR=place.address)
    if gpus:
        torch.cuda.set_device(local)
        return "nccl"
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return "gloo"


def _join(place: Place, work: Callable[[int], Any], *, folder: Path) -> Any:
    """Be one rank of a run; whoever started us ends the others when we exit with an error."""
    backend = _take_device(place)
    with own_log(rank_log(folder, place.rank), show=place.rank == 0) as console:
        os.environ[CONSOLE] = f"{console.fileno()}"
        try:
            return _meet_all_and_work(place, work, backend, patience=PATIENCE)
        except Exception as error:
            failure = Failure.of(error)
            kind = "user" if failure.by_user else "lost peer" if failure.lost_peer else "error"
            culprit = error.rank if isinstance(error, RankError) else None
            record(f"rank-{place.rank}", kind=kind, report=failure.report.splitlines()[-1], culprit=culprit)
            if place.rank:  # what rank 0 says reaches the console anyway
                time.sleep(failure.by_user)  # most likely rank 0 has the same to say, and its exit has ended us before we repeat it
                console.write(f"rank {place.rank} {failure.report.splitlines()[-1] if failure.lost_peer else failure.report}\n")
            if failure.by_user:
                raise
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # at once: leaving in order would wait for peers


def _meet_all_and_work(place: Place, work: Callable[[int], Any], backend: str, *, patience: float) -> Any:
    said = _choose_interface(place)
    if place.port is None:
        store, port = meet(place, patience=patience)
        os.environ["MASTER_PORT"] = f"{port}"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timedelta(seconds=patience))
    else:
        os.environ["MASTER_PORT"] = f"{place.port}"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=patience))
        except dist.DistError as error:
            where = f"{place.address}:{place.port}"
            cure = f"see that all {place.world} tasks started and that no firewall closes the port"
            raise RankError(place.rank, f"met nobody at {where} within {patience:g} s; {cure}") from error
    if place.rank == 0:
        record("start", hosts=place.hosts, world=place.world)
        sys.stdout.write(f"{place.world} ranks met at {place.address}:{os.environ['MASTER_PORT']}; {said}\n")
    result = work(place.rank)
    dist.barrier()  # rank 0 holds the meeting point open until the last one is done
    dist.destroy_process_group()
    return result


def _choose_interface(place: Place) -> str:
    """See to it that gloo, and NCCL where it speaks TCP, use the network that leads to the other nodes; returns what to say of it.

    Left alone, gloo takes the address that this machine's own name stands for, which on many is a loopback address.
    """
    given = {name: os.environ[name] for name in INTERFACES if name in os.environ}
    peers = [host for host in place.hosts if host != node_name()]
    if len(given) < len(INTERFACES) and peers and (found := find_interface(peers[0])):
        for name in INTERFACES:
            os.environ.setdefault(name, found[0])
        told = "".join(f", {name} = {value} as set" for name, value in given.items())
        return f"gloo and NCCL's TCP use {found[0]} ({found[1]}), by which {peers[0]} is reached{told}"
    return ", ".join(f"{name} = {value}" for name, value in given.items()) or "gloo and NCCL choose their interface themselves"
