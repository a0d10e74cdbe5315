"""`megalite bench network`: what the links between ranks do, by collective and size; and the two numbers the tuner wants to know of them.

In: ranks, forked on a CPU, or those that torchrun, srun or the GPUs of this machine make.  Out: a table of bus bandwidths, network.json,
and for each collective alpha (seconds a call) and beta (bytes a second) of the line alpha + bytes / beta through the medians. Bus
bandwidth is what a ring moves a rank and second: (n - 1)/n of a gather's or scatter's bytes, twice that of an all-reduce's (as nccl-tests
count).
"""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from megalite import launch
from megalite.config import Config, Mesh, Run
from megalite.errors import UserError
from megalite.log import open_console

SIZES = tuple(1 << power for power in range(14, 27, 2))  # 16 KiB to 64 MiB
REPEATS = 9


def measure_links(*, ranks: int, folder: Path) -> int:
    """Measure, print, write network.json; returns 0."""
    if torch.cuda.is_available() or not launch.stands_alone():
        config = Config(mesh=Mesh(), run=Run(folder=str(folder)))
        found = launch.start(config, functools.partial(_of_config, sizes=SIZES))
    else:
        if ranks < 2:
            raise UserError(f"--ranks {ranks} has no link; give 2 or more")
        found = launch.run_ranks(ranks, functools.partial(time_links, sizes=SIZES))[0]
    if not launch.is_rank_zero():
        return 0
    console = open_console()
    console.print(_table(found))
    lines = {kind: line(found["seconds"][kind]) for kind in found["seconds"]}
    for kind, (alpha, beta) in lines.items():
        console.print(f"{kind:15s} {1e6 * alpha:10.1f} us a call, {beta / 1e9:8.3f} GB/s a rank", markup=False)
    path = folder / "network.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**found, "lines": {kind: {"alpha": a, "beta": b} for kind, (a, b) in lines.items()}}, indent=1))
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error.strerror}); choose another folder") from None
    console.print(f"written      {path}", markup=False)
    return 0


def _of_config(config: Config, rank: int, *, sizes: tuple[int, ...]) -> dict[str, Any]:
    return time_links(rank, sizes=sizes)


def time_links(rank: int, *, sizes: tuple[int, ...], kinds: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Median seconds of each collective (or those of `kinds`) by bytes moved a rank; of the slowest rank."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    world = dist.get_world_size()
    seconds: dict[str, dict[int, float]] = {}
    for kind in kinds or tuple(KINDS):
        prepare, seconds[kind] = KINDS[kind], {}
        for size in sizes:
            call, moved = prepare(size, world, rank, device)
            seconds[kind][moved] = _median(call, device)
    return {"ranks": world, "device": str(device.type), "seconds": seconds}


def _median(call: Callable[[], Any], device: torch.device) -> float:
    took = []
    for _ in range(REPEATS + 2):
        dist.barrier()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    slowest = torch.tensor(took[2:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


Prepared = tuple[Callable[[], Any], int]


def _floats(size: int, world: int, device: torch.device) -> torch.Tensor:
    return torch.ones(max(1, size // 4 // world) * world, device=device)


def _all_reduce(size: int, world: int, rank: int, device: torch.device) -> Prepared:
    whole = _floats(size, world, device)
    return lambda: dist.all_reduce(whole), 2 * (world - 1) * whole.numel() * 4 // world


def _all_gather(size: int, world: int, rank: int, device: torch.device) -> Prepared:
    whole = _floats(size, world, device)
    part = whole.chunk(world)[rank].clone()
    return lambda: dist.all_gather_into_tensor(whole, part), (world - 1) * whole.numel() * 4 // world


def _reduce_scatter(size: int, world: int, rank: int, device: torch.device) -> Prepared:
    whole = _floats(size, world, device)
    part = whole.chunk(world)[rank].clone()
    return lambda: dist.reduce_scatter_tensor(part, whole), (world - 1) * whole.numel() * 4 // world


def _all_to_all(size: int, world: int, rank: int, device: torch.device) -> Prepared:
    whole = _floats(size, world, device)
    there = torch.empty_like(whole)
    return lambda: dist.all_to_all_single(there, whole), (world - 1) * whole.numel() * 4 // world


def _send(size: int, world: int, rank: int, device: torch.device) -> Prepared:
    """Around the ring: every rank sends to the next one."""
    whole = _floats(size, world, device)
    there = torch.empty_like(whole)

    def call() -> None:
        ring = [dist.P2POp(dist.isend, whole, (rank + 1) % world), dist.P2POp(dist.irecv, there, (rank - 1) % world)]
        for work in dist.batch_isend_irecv(ring):
            work.wait()

    return call, whole.numel() * 4


KINDS: dict[str, Callable[..., Prepared]] = {
    "all-reduce": _all_reduce,
    "all-gather": _all_gather,
    "reduce-scatter": _reduce_scatter,
    "all-to-all": _all_to_all,
    "send": _send,
}


def line(seconds: dict[int, float]) -> tuple[float, float]:
    """alpha and beta of alpha + bytes / beta, by least squares on relative errors, neither below zero."""
    moved, took = np.array([*seconds], dtype=float), np.array([*seconds.values()])
    design = np.stack([1 / took, moved / took], axis=1)
    (alpha, slope), *_ = np.linalg.lstsq(design, np.ones(len(took)), rcond=None)
    if alpha < 0:
        alpha, slope = 0.0, float((took * moved).sum() / (moved**2).sum())
    return float(alpha), float(1 / max(slope, 1e-15))


def _table(found: dict[str, Any]) -> Table:
    table = Table(f"GB/s a rank, {found['ranks']} ranks on {found['device']}", *KINDS)
    for number, size in enumerate(SIZES):
        cells = []
        for kind in KINDS:
            moved, took = [*found["seconds"][kind].items()][number]
            cells.append(f"{int(moved) / took / 1e9:.3f}")
        table.add_row(f"{size // 1024} KiB", *cells)
    return table
